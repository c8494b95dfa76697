// Stands in for csrc/cuda/instructions.cuh: what these instructions do, in C++.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace equimini {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

inline void* block_memory() { return cuda_on_cpu::machine.shared.get(); }

inline float exp2_of(float x) { return x < -126 ? 0.0f : std::exp2(x); }

template <class T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> (16 * which));
  T value;
  std::memcpy(&value, &bits, 2);
  if constexpr (std::is_same_v<T, __half>) return __half2float(value);
  else return __bfloat162float(value);
}

// mma.sync.m16n8k16; the layout is described beside the real one.
template <class T>
void matrix_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         std::source_location at = std::source_location::current()) {
  struct Fragments { uint32_t a[4], b[2]; } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const int lane = cuda_on_cpu::machine.current % 32;
  cuda_on_cpu::exchange({"mma", at.line(), 0xffffffffu, 0}, mine, [&](auto given) {
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 16; k++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        c[i] += half_of<T>(given(row % 8 * 4 + k % 8 / 2).a[k / 8 * 2 + row / 8], k % 2) *
                half_of<T>(given(column * 4 + k % 8 / 2).b[k / 8], k % 2);
      }
    return 0;
  });
}

// ldmatrix; this layout, too, is described beside the real one.
inline void load_matrices(uint32_t (&x)[4], const void* row, bool transposed = false,
                          std::source_location at = std::source_location::current()) {
  const int lane = cuda_on_cpu::machine.current % 32;
  cuda_on_cpu::exchange({"ldmatrix", at.line(), 0xffffffffu, transposed}, row, [&](auto given) {
    for (int m = 0; m < 4; m++) {
      const auto element = [&](int r, int c) {
        return uint32_t(static_cast<const uint16_t*>(given(8 * m + r))[c]);
      };
      const int mine = lane / 4, pair = lane % 4 * 2;
      x[m] = transposed ? element(pair, mine) | element(pair + 1, mine) << 16
                        : element(mine, pair) | element(mine, pair + 1) << 16;
    }
    return 0;
  });
}
inline void load_transposed(uint32_t (&x)[4], const void* row,
                            std::source_location at = std::source_location::current()) {
  load_matrices(x, row, true, at);
}

}  // namespace equimini
