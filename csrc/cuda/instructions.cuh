// Instructions of the GPU that CUDA C++ has no function for, and the block's shared memory.
// Included as <cuda/instructions.cuh>: tests that run the kernels on a CPU put their own before it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace equimini {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// Dynamic shared memory of the block.
__device__ inline void* block_memory() {
  extern __shared__ __align__(16) unsigned char pool[];
  return pool;
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

}  // namespace equimini
