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
constexpr float kNothing = -1e30f;  // running maximum before any key was seen
constexpr uint32_t kWarp = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float16 x) { return __half2float(x); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline float16 from_float<float16>(float x) { return __float2half_rn(x); }

// Eight consecutive values of a row, as they lie in memory: one or two 16-byte accesses.
template <class T>
struct alignas(16) Eight {
  T value[8];
};

template <class T>
__device__ inline Eight<T> load_eight(const T* from) {
  Eight<T> x;
  for (int part = 0; part < int(sizeof(x) / 16); part++)
    reinterpret_cast<uint4*>(&x)[part] = reinterpret_cast<const uint4*>(from)[part];
  return x;
}

template <class T>
__device__ inline void store_eight(T* to, const float (&x)[8]) {
  Eight<T> y;
#pragma unroll
  for (int c = 0; c < 8; c++) y.value[c] = from_float<T>(x[c]);
  for (int part = 0; part < int(sizeof(y) / 16); part++)
    reinterpret_cast<uint4*>(to)[part] = reinterpret_cast<uint4*>(&y)[part];
}

// The four cosines and sines of channels 8·slot … 8·slot + 7 at a position.
struct Turn {
  float cos[4], sin[4];

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
#pragma unroll
  for (int c = 0; c < 8; c++) x[c] = to_float(raw.value[c]) * by;
  if (rotated && p.cos) Turn(p, position, slot).rotate(x);
}

// What dropout multiplies a weight with: 0 or 1/(1−p), and 1 without dropout.
struct Dropout {
  bool on;
  uint32_t below;
  float factor;

  __device__ explicit Dropout(const Attention& p)
      : on(p.seed != nullptr), below(p.drop_below), factor(float(p.keep_factor)) {}
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
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(unsigned(blocks)), dim3(threads), shared, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  return cudaGetLastError();
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

// Four transposed 8×8 matrices of 16-bit values from shared memory.  Lane 8m + r points to row r
// of matrix m; lane 4c + i receives rows 2i and 2i + 1 of column c of each matrix.
__device__ inline void load_transposed(uint32_t (&x)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

#endif

}  // namespace equimini
