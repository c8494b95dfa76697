// One problem of windowed attention, as the CPU and the CUDA kernels get it, and the dropout hash.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif

namespace equimini {

enum class Dtype : int { float32, bfloat16, float16, float64 };

// Heads of tokens, (B, N, H, D), anywhere in memory: strides in elements, the last one is 1.
struct Heads {
  const void* data;
  int64_t batch, token, head;

  template <class T>
  HOST_DEVICE const T* row(int64_t b, int64_t n, int64_t h) const {
    return static_cast<const T*>(data) + b * batch + n * token + h * head;
  }
};

// One call of the operator; equimini/attention.py says what each argument means.
struct Attention {
  Heads q, k, v, grad;       // grad (of the output): backward only
  void *out, *lse;           // (B, Nq, H, D), (B, H, Nq): results, there for backward
  void *dq, *dk, *dv;        // contiguous, backward only
  const float *cos, *sin;    // (Nk, D/2), or null: no rotation
  const int64_t* seed;       // one number where the kernel runs, or null: no dropout
  int64_t b, n_q, n_k, h, d, window;
  double scale;              // of the scores
  double keep_factor;        // 1 / (1 − dropout_p), what dropout multiplies kept weights with
  uint32_t drop_below;       // dropout_p · 2³²: hashes under it are dropped

  HOST_DEVICE int64_t offset() const { return n_k - n_q; }  // query 0 stands at this position
  HOST_DEVICE int64_t contiguous_row(int64_t bi, int64_t n, int64_t hi, int64_t length) const {
    return ((bi * length + n) * h + hi) * d;  // where a row of (B, length, H, D) starts
  }
};

// MurmurHash3's finalizer.
HOST_DEVICE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// The weight of key j for the query at position i is dropped where
// mix(dropout_row(seed, b, h, i) ^ j) < drop_below; keep_mask in Python is the same function.
HOST_DEVICE uint32_t dropout_head(int64_t seed, uint32_t b, uint32_t h) {
  uint32_t state = mix(static_cast<uint32_t>(seed) ^ 0x9E3779B9u);
  state = mix(state ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  return mix(mix(state ^ b) ^ h);
}
HOST_DEVICE uint32_t dropout_row(int64_t seed, uint32_t b, uint32_t h, uint32_t i) {
  return mix(dropout_head(seed, b, h) ^ i);
}

}  // namespace equimini
