// Stands in for CUDA's header of this name; see cuda_runtime.h.
#pragma once
#include "cuda_runtime.h"

struct __half { _Float16 value; };
inline __half __ushort_as_half(uint16_t bits) {
  __half x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
