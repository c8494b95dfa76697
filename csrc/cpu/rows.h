// What both CPU kernels are made of: vectors, eˣ, scratch memory, and rows that are converted and
// rotated on their way in and out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

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
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
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
struct BFloat16 { uint16_t bits; };
#ifdef __F16C__  // instructions convert it; Clang 14 has no _Float16 for these processors
struct Float16 { uint16_t bits; };
#else
using Float16 = _Float16;
#endif

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

// Lane n is lane from[n] of a and b, one after the other.
template <class C, int... from>
inline typename Simd<C>::Vec pick(typename Simd<C>::Vec a, typename Simd<C>::Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, typename Simd<C>::Int{from...});
#endif
}
template <class C>
using Lanes = std::make_integer_sequence<int, kLanes<C>>;

template <class C, int... i>
inline typename Simd<C>::Vec swap_pairs(typename Simd<C>::Vec x, std::integer_sequence<int, i...>) {
  return pick<C, (i ^ 1)...>(x, x);
}

// A vector from as many values in memory, and back: rounded to nearest, ties to even.
template <class C>
inline void read(typename Simd<C>::Vec& x, const C* from) { std::memcpy(&x, from, sizeof(x)); }
template <class C>
inline void write(C* to, typename Simd<C>::Vec x) { std::memcpy(to, &x, sizeof(x)); }

#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC 12 takes twice as many instructions
inline Simd<float>::Bits widen(Simd<float>::Half x) {
  return reinterpret_cast<Simd<float>::Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
}
inline Simd<float>::Half narrow(Simd<float>::Bits x) {  // of values under 2¹⁶
  const auto y = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<Simd<float>::Half>(
      _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}
#else
inline Simd<float>::Bits widen(Simd<float>::Half x) {
  return __builtin_convertvector(x, Simd<float>::Bits);
}
inline Simd<float>::Half narrow(Simd<float>::Bits x) {
  return __builtin_convertvector(x, Simd<float>::Half);
}
#endif
inline void read(Simd<float>::Vec& x, const BFloat16* from) {
  Simd<float>::Half bits;
  std::memcpy(&bits, from, sizeof(bits));
  x = reinterpret_cast<Simd<float>::Vec>(widen(bits) << 16);
}
inline void write(BFloat16* to, Simd<float>::Vec x) {
  const auto wide = reinterpret_cast<Simd<float>::Bits>(x);
  const Simd<float>::Bits rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  const auto bits = narrow(x == x ? rounded : Simd<float>::Bits{} + 0x7fc0);  // NaN stays NaN
  std::memcpy(to, &bits, sizeof(bits));
}
#if defined(__AVX512F__)
inline void read(Simd<float>::Vec& x, const Float16* from) {
  x = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void write(Float16* to, Simd<float>::Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline void read(Simd<float>::Vec& x, const Float16* from) {
  x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void write(Float16* to, Simd<float>::Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline void read(Simd<float>::Vec& x, const Float16* from) {
  for (int lane = 0; lane < kLanes<float>; lane++) x[lane] = static_cast<float>(from[lane]);
}
inline void write(Float16* to, Simd<float>::Vec x) {
  for (int lane = 0; lane < kLanes<float>; lane++) to[lane] = static_cast<Float16>(x[lane]);
}
#endif

// How a position's rows are rotated: cos, and −sin or sin, for both channels of every pair.
template <class C>
struct Turn {
  using At = const Turn*;  // null: no rotation
  alignas(64) C cos[128]{}, sin[128]{};

  At to(const Attention& p, int64_t position) {
    if (!p.cos) return nullptr;
    const float *x = p.cos + position * p.d / 2, *y = p.sin + position * p.d / 2;
    for (int64_t c = 0; c < p.d; c += 2) {
      cos[c] = cos[c + 1] = x[c / 2];
      sin[c] = -y[c / 2], sin[c + 1] = y[c / 2];
    }
    return this;
  }
};

// x, channels c, c + 1, … of a row, rotated by sign times the position's angle.
template <class C>
inline typename Simd<C>::Vec rotate(typename Simd<C>::Vec x, const Turn<C>& turn, int64_t c,
                                    C sign) {
  using Vec = typename Simd<C>::Vec;
  return x * reinterpret_cast<const Vec&>(turn.cos[c]) +
         swap_pairs<C>(x, Lanes<C>()) * (sign * reinterpret_cast<const Vec&>(turn.sin[c]));
}

// A row of D values of type T becomes `width` values of type C: converted, rotated, times `by`.
template <class T, class C>
inline void load_row(C* __restrict to, const T* __restrict from, int64_t d, int64_t width,
                     typename Turn<C>::At turn, C by = 1) {
  constexpr int lanes = kLanes<C>;
  auto put = [&](const T* source, int64_t c) {
    typename Simd<C>::Vec x;
    read(x, source);
    if (turn) x = rotate(x, *turn, c, C(1));
    reinterpret_cast<typename Simd<C>::Vec&>(to[c]) = x * by;
  };
  int64_t c = 0;
  for (; c + lanes <= d; c += lanes) put(from + c, c);
  if (c < width) {  // D is a multiple of 8: half a vector of AVX-512
    T part[lanes]{};
    std::copy(from + c, from + d, part);
    put(part, c);
  }
}

// The way back: rotated by the opposite angle, times `by`, converted to T.
template <class T, class C>
inline void store_row(T* __restrict to, const C* __restrict from, int64_t d,
                      typename Turn<C>::At turn, C by = 1) {
  constexpr int lanes = kLanes<C>;
  auto put = [&](T* target, int64_t c) {
    auto x = reinterpret_cast<const typename Simd<C>::Vec&>(from[c]);
    if (turn) x = rotate(x, *turn, c, C(-1));
    write(target, x * by);
  };
  int64_t c = 0;
  for (; c + lanes <= d; c += lanes) put(to + c, c);
  if (c < d) {
    T part[lanes];
    put(part, c);
    std::copy(part, part + d - c, to + c);
  }
}

}  // namespace equimini
