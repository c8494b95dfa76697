// Small device functions that both kernel families use: 16-byte rows, conversions, rotation,
// and the tensor-core instructions.  Under g++ the header tests/cuda_on_cpu.h takes CUDA's
// place, and these same kernels run on the CPU.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

#include "cuda_kernels.h"

namespace equimini {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

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

#ifdef __CUDACC__

constexpr int kTooLarge = cudaErrorInvalidConfiguration;  // more work items than 32 bits count

// Dynamic shared memory of the block.
__device__ inline void* shared_memory() {
  extern __shared__ __align__(16) unsigned char pool[];
  return pool;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
           void* stream, Arguments... arguments) {
  if (shared > 48 * 1024) {  // more than every device grants unasked
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return cudaGetLastError();  // which forgets it
  }
  kernel<<<dim3(unsigned(blocks)), dim3(threads), shared, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  return cudaGetLastError();
}

// 2^x, two roundings from it at most; 0 below 2^−126, for which exp2f takes more instructions.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c (16×8 floats) += a (16×16) · b (16×8), spread over the warp as mma.sync.m16n8k16 has it:
// lane 4r + c holds of a the pairs of columns 2c and 2c + 8 in rows r and r + 8, of b the pairs
// of rows 2c and 2c + 8 in column r, of c the columns 2c, 2c + 1 in rows r and r + 8.
template <class T>
__device__ inline void matrix_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, bfloat16>)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8×8 matrices of 16-bit values from shared memory.  Lane 8m + r points to row r of matrix
// m; lane 4r + i receives columns 2i and 2i + 1 of row r of each matrix.  Transposed, lane
// 4c + i receives rows 2i and 2i + 1 of column c.
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&x)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

#endif

}  // namespace equimini
