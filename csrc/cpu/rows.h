// What both CPU kernels are made of: vectors, eˣ, scratch memory, and rows that are converted and
// rotated on their way in and out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../attention.h"

namespace equimini {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kWide = kVectorBytes == 64 ? 4 : 2;  // vectors of a row that loops hold at once

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int32_t Lane;
  typedef int32_t Int __attribute__((vector_size(kVectorBytes), may_alias));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int64_t Lane;
  typedef int64_t Int __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

// 16-bit values as they lie in memory.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = x != x ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
using Float16 = _Float16;

// Aligned scratch of one thread, handed out piece by piece.
template <class C>
class Scratch {
 public:
  explicit Scratch(size_t count)
      : pool_(static_cast<C*>(std::aligned_alloc(64, (count * sizeof(C) + 63) / 64 * 64)),
              &std::free), next_(pool_.get()) {}
  C* take(size_t count) { C* piece = next_; next_ += count; return piece; }

 private:
  std::unique_ptr<C, decltype(&std::free)> pool_;
  C* next_;
};

// eˣ for x ≤ 0, one per lane: 2ⁿ · 2ᶠ with |f| ≤ ½ and a polynomial for 2ᶠ (about 2 ulp).
// Results under e⁻⁸⁶ are 0, so that masked scores (−∞) weigh nothing.
inline Simd<float>::Vec exp_lanes(Simd<float>::Vec x) {
  using Vec = Simd<float>::Vec;
  using Int = Simd<float>::Int;
  const Int tiny = x < -86.0f;
  x = tiny ? Vec{} : x;
  const float round = 12582912.0f;  // 1.5 · 2²³: adding it leaves the nearest integer
  const Vec shifted = x * 1.44269504f + round;
  const Vec n = shifted - round;
  const Vec f = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two pieces
  Vec y = f * 1.9875691500e-4f + 1.3981999507e-3f;            // Cephes' coefficients of expf
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  const Int exponent = (reinterpret_cast<Int>(shifted) + 127) << 23;  // n in the lowest bits
  return tiny ? Vec{} : y * reinterpret_cast<Vec>(exponent);
}

inline Simd<double>::Vec exp_lanes(Simd<double>::Vec x) {
  for (int lane = 0; lane < kLanes<double>; lane++) x[lane] = std::exp(x[lane]);
  return x;
}

// A row of D values of type T becomes `width` values of type C: converted, rotated, times `by`.
template <class T, class C>
void load_row(C* __restrict to, const T* __restrict from, int64_t d, int64_t width,
              const float* __restrict cos, const float* __restrict sin, C by = 1) {
  for (int64_t c = 0; c < d; c++) to[c] = static_cast<C>(from[c]) * by;
  for (int64_t c = d; c < width; c++) to[c] = 0;
  if (cos)
    for (int64_t c = 0; c < d / 2; c++) {
      const C even = to[2 * c], odd = to[2 * c + 1];
      to[2 * c] = even * cos[c] - odd * sin[c];
      to[2 * c + 1] = odd * cos[c] + even * sin[c];
    }
}

// The way back: rotated by the opposite angle, times `by`, converted to T.  Changes `from`.
template <class T, class C>
void store_row(T* __restrict to, C* __restrict from, int64_t d, const float* __restrict cos,
               const float* __restrict sin, C by = 1) {
  if (cos)
    for (int64_t c = 0; c < d / 2; c++) {
      const C even = from[2 * c], odd = from[2 * c + 1];
      from[2 * c] = even * cos[c] + odd * sin[c];
      from[2 * c + 1] = odd * cos[c] - even * sin[c];
    }
  for (int64_t c = 0; c < d; c++) to[c] = static_cast<T>(from[c] * by);
}

}  // namespace equimini
