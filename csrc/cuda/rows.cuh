// What the kernel families share: 16-byte rows on their way in and out (conversions, rotation,
// dropout), sums over groups of lanes, and the launch.
#pragma once
#include <cuda/instructions.cuh>

#include <algorithm>

#include "kernels.h"

namespace equimini {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNothing = -3.4e38f;  // running maximum before any key was seen
constexpr uint32_t kWarp = 0xffffffffu;

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline float16 from_float<float16>(float x) { return __float2half_rn(x); }

// Eight consecutive values of a row, as they lie in memory: one or two 16-byte accesses.  They
// stay 32-bit words until they are used: of an array of 16-bit values the compiler would sort
// the halves as soon as they come, and wait for every load before the next.
template <class T>
struct Eight {
  uint4 part[sizeof(T) / 2];
};

template <class T>
__device__ inline Eight<T> load_eight(const T* from) {
  Eight<T> x;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); i++) x.part[i] = reinterpret_cast<const uint4*>(from)[i];
  return x;
}

// One tensor's rows of one head, a lane's 8 channels of each.
template <class T>
struct Rows {
  const T* first;
  int64_t step;
  int offset, count;  // the first row stands at position `offset`

  __device__ Rows(const Heads& x, int b, int h, int channel, int offset, int count)
      : first(x.row<T>(b, 0, h) + channel), step(x.token), offset(offset), count(count) {}
  // The row at a position, or the nearest there is.
  __device__ Eight<T> at(int position) const {
    return load_eight(first + unsigned(std::max(0, std::min(position - offset, count - 1))) * step);
  }
};

// The two values in a word of memory.
template <class T>
__device__ inline float low_half(uint32_t word) {
  if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(word << 16);
  else return __half2float(__ushort_as_half(uint16_t(word)));
}
template <class T>
__device__ inline float high_half(uint32_t word) {
  if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(word & 0xffff0000u);
  else return __half2float(__ushort_as_half(uint16_t(word >> 16)));
}

template <class T>
__device__ inline void unpack(float (&x)[8], const Eight<T>& raw) {
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); i++) {
    const uint4 part = raw.part[i];
    const uint32_t words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if constexpr (sizeof(T) == 4) x[4 * i + w] = __uint_as_float(words[w]);
      else x[2 * w] = low_half<T>(words[w]), x[2 * w + 1] = high_half<T>(words[w]);
    }
  }
}

template <class T>
__device__ inline void store_eight(T* to, const float (&x)[8]) {
  struct alignas(16) Values { T value[8]; } y;
#pragma unroll
  for (int c = 0; c < 8; c++) y.value[c] = from_float<T>(x[c]);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); i++)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&y)[i];
}

__device__ inline void scale_by(float (&x)[8], float by) {
#pragma unroll
  for (int c = 0; c < 8; c++) x[c] *= by;
}
__device__ inline void add(float (&sum)[8], float weight, const float (&x)[8]) {
#pragma unroll
  for (int c = 0; c < 8; c++) sum[c] += weight * x[c];
}
__device__ inline float dot(const float (&x)[8], const float (&y)[8]) {
  float sum = 0;
#pragma unroll
  for (int c = 0; c < 8; c++) sum += x[c] * y[c];
  return sum;
}
// Sum over the G neighbouring lanes of a group; every one of them gets it.
template <int G>
__device__ inline float over_group(float sum) {
#pragma unroll
  for (int step = G / 2; step; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  return sum;
}

// The four cosines and sines of channels 8·slot … 8·slot + 7 at a position.
struct Turn {
  alignas(16) float cos[4], sin[4];

  __device__ Turn(const Attention& p, int position, int slot) {
    const int64_t at = position * (p.d / 2) + 4 * slot;
    *reinterpret_cast<float4*>(cos) = *reinterpret_cast<const float4*>(p.cos + at);
    *reinterpret_cast<float4*>(sin) = *reinterpret_cast<const float4*>(p.sin + at);
  }
  // Rotate pairs by the angle, or with direction −1 back by it.
  __device__ void rotate(float (&x)[8], float direction = 1) const {
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      const float even = x[2 * pair], odd = x[2 * pair + 1], s = direction * sin[pair];
      x[2 * pair] = even * cos[pair] - odd * s;
      x[2 * pair + 1] = odd * cos[pair] + even * s;
    }
  }
};

// Eight values as floats, rotated if `rotated` and the problem has tables, times `by`.
template <class T>
__device__ inline void widen(float (&x)[8], const Eight<T>& raw, const Attention& p,
                             int position, int slot, bool rotated, float by) {
  unpack(x, raw);
  scale_by(x, by);
  if (rotated && p.cos) Turn(p, position, slot).rotate(x);
}

// What dropout multiplies a weight with: 0 or 1/(1−p), and 1 without dropout.
struct Dropout {
  bool on;
  uint32_t below;
  float factor;

  __device__ explicit Dropout(const Attention& p)
      : on(p.seed != nullptr), below(p.drop_below), factor(float(p.keep_factor)) {}
  __device__ uint32_t head(const Attention& p, int b, int h) const {
    return on ? dropout_head(*p.seed, uint32_t(b), uint32_t(h)) : 0;
  }
  __device__ uint32_t row(uint32_t head, int position) const {
    return on ? mix(head ^ uint32_t(position)) : 0;
  }
  __device__ float keep(uint32_t row, int key) const {
    return !on ? 1.0f : mix(row ^ uint32_t(key)) < below ? 0.0f : factor;
  }
};

constexpr int kTooLarge = cudaErrorInvalidConfiguration;  // more work items than 32 bits count

template <class T>
struct Same { using type = T; };  // keeps arguments from deciding what a kernel's parameters are

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
           void* stream, typename Same<Parameters>::type... arguments) {
  if (shared > 48 * 1024) {  // more than every device grants unasked
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return cudaGetLastError();  // which forgets it
  }
  void* pointers[] = {&arguments...};
  cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), pointers, shared,
                   static_cast<cudaStream_t>(stream));
  return cudaGetLastError();
}

}  // namespace equimini
