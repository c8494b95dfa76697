// Windowed causal attention on the CPU for wide windows, forward and backward.
//
// One work item is one (batch, head, chunk of positions).  Within it a tile of queries meets
// blocks of keys, as in FlashAttention, and everything that is computed lies in a scratch of a
// few hundred kilobytes per thread that stays in the L2 cache: rows are converted to float and
// rotated once, when a tile or block is loaded, and no N×N or N×W array exists.
//
// A *strip* is as many queries as a vector has lanes (16 floats with AVX-512).  Scores of a strip
// are kept as S[key][query], so that mask, softmax and dropout act on whole vectors, one lane per
// query, with no sum across lanes.  All products are then one micro-kernel,
// y[r] += Σ_t a[r, t] · x[t], that broadcasts the scalar a and keeps R×V vectors of y in
// registers:
//
//     S[j]   = Σ_d K[j, d] Qᵀ[d]        dP[j] = Σ_d V[j, d] dOᵀ[d]       lanes are queries
//     O[i]  += Σ_j P[j, i] V[j]         dQ[i] += Σ_j dS[j, i] K[j]       lanes are channels
//     dV[j] += Σ_i P[j, i] dO[i]        dK[j] += Σ_i dS[j, i] Q[i]       lanes are channels
//
// The last four run over the band alone: 4 rows (kRows) at a time meet W + 3 keys, not the whole
// block.  In the backward pass an item owns its chunk's dQ, dK and dV.  Queries up to W − 1 behind
// the chunk also see its keys; their scores are computed again, which costs (chunk + W) / chunk
// and spares atomics: the order of every sum is fixed by the shapes, so results repeat bit for bit.
#pragma once
#include "rows.h"

namespace equimini {

constexpr int kStrips = 256 / kVectorBytes;  // strips in a tile: 64 queries, 32 in double
constexpr int kBlock = 128;                  // keys in a block
constexpr int kScoreRows = 8;                // rows of scores that the micro-kernel holds
constexpr double kNothing = -1e30;           // running maximum before any key was seen

template <class C>
constexpr int kRows = std::min(4, kLanes<C>);  // rows of y that it holds: no more than a strip has
template <class C>
constexpr int kTile = kStrips * kLanes<C>;

// y[r] (+)= Σ_{t < n} a[r·a_row + t·a_step] · x[t·x_step], for R rows of V vectors each.
template <int R, int V, bool Add, class C>
inline void micro_kernel(C* y, int64_t y_row, const C* a, int64_t a_row, int64_t a_step,
                         const C* x, int64_t x_step, int64_t n) {
  using Vec = typename Simd<C>::Vec;
  Vec sum[R][V];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++)
      sum[r][c] = Add ? reinterpret_cast<Vec*>(y + r * y_row)[c] : Vec{};
  for (int64_t t = 0; t < n; t++) {
    const Vec* x_t = reinterpret_cast<const Vec*>(x + t * x_step);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < V; c++) sum[r][c] += a[r * a_row + t * a_step] * x_t[c];
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) reinterpret_cast<Vec*>(y + r * y_row)[c] = sum[r][c];
}

// kRows<C> rows of y, each `width` long, += Σ_t a[r, t] · x[t]; x and y rows are `width` apart.
template <class C>
void add_rows(C* y, const C* a, int64_t a_row, int64_t a_step, const C* x, int64_t width,
              int64_t n) {
  constexpr int lanes = kLanes<C>;
  int64_t c = 0;
  for (; c + kWide * lanes <= width; c += kWide * lanes)
    micro_kernel<kRows<C>, kWide, true>(y + c, width, a, a_row, a_step, x + c, width, n);
  for (; c < width; c += lanes)
    micro_kernel<kRows<C>, 1, true>(y + c, width, a, a_row, a_step, x + c, width, n);
}

// scores[j] = Σ_d keys[j, d] · strip[d] for `count` keys, rounded up to a multiple of 8.
template <class C>
void score_rows(C* scores, const C* keys, const C* strip, int64_t width, int64_t count) {
  for (int64_t j = 0; j < count; j += kScoreRows)
    micro_kernel<kScoreRows, 1, false>(scores + j * kLanes<C>, kLanes<C>, keys + j * width, width,
                                       1, strip, kLanes<C>, width);
}

// Work of one head: sizes, and the loads that forward and backward share.
template <class T, class C>
struct Head {
  using Vec = typename Simd<C>::Vec;
  using Int = typename Simd<C>::Int;
  using Lane = typename Simd<C>::Lane;
  static constexpr int lanes = kLanes<C>;

  const Attention& p;
  int64_t b, h, width, window;
  mutable Turn<C> turn;

  Head(const Attention& p, int64_t b, int64_t h)
      : p(p), b(b), h(h), width((p.d + lanes - 1) / lanes * lanes),
        window(std::min(p.window, p.n_k)) {}

  static int64_t padded(int64_t queries) { return (queries + lanes - 1) / lanes * lanes; }

  // Rows of one head lie far apart, where no hardware prefetcher follows.  The next work item is
  // the next head, whose row lies right behind this one: ask for it a whole item ahead.
  void prefetch(const Heads& x, int64_t n) const {
    const char* row = reinterpret_cast<const char*>(x.row<T>(b, n, std::min(h + 1, p.h - 1)));
    for (int64_t byte = 0; byte < p.d * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(row + byte);
  }

  void load_keys(C* k, C* v, int64_t first, int64_t count) const {
    for (int64_t j = 0; j < count; j++) {
      prefetch(p.k, first + j);
      prefetch(p.v, first + j);
      load_row(k + j * width, p.k.row<T>(b, first + j, h), p.d, width, turn.to(p, first + j));
      load_row<T, C>(v + j * width, p.v.row<T>(b, first + j, h), p.d, width, nullptr);
    }
  }

  // Queries at positions first … first + count, times scale; the rest of the last strip is 0.
  void load_queries(C* q, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; i++) {
      prefetch(p.q, first + i - p.offset());
      load_row(q + i * width, p.q.row<T>(b, first + i - p.offset(), h), p.d, width,
               turn.to(p, first + i), static_cast<C>(p.scale));
    }
    std::fill(q + count * width, q + padded(count) * width, C(0));
  }

  // rows (tile, width) → strips (kStrips, width, lanes)
  void transpose(C* strips, const C* rows, int64_t count) const {
    for (int64_t i0 = 0; i0 < count; i0 += lanes)
      for (int64_t c = 0; c < width; c++)
        for (int lane = 0; lane < lanes; lane++)
          strips[(i0 * width) + c * lanes + lane] = rows[(i0 + lane) * width + c];
  }

  // Which lanes, queries at first, first + 1, …, see key j?
  Int visible(int64_t first, int64_t j) const {
    Int behind;  // how far key j lies behind each of them
    for (int lane = 0; lane < lanes; lane++) behind[lane] = lane;
    behind += static_cast<Lane>(first - j);
    return (behind >= 0) & (behind < static_cast<Lane>(window));
  }
  bool all_visible(int64_t first, int64_t last, int64_t j) const {
    return j <= first && last - j < window;
  }

  // Hash state of a strip's rows, and 1/(1−p) or 0 for each lane's weight of key j.
  void dropout_rows(uint32_t* rows, int64_t first) const {
    for (int lane = 0; lane < lanes && p.seed; lane++)
      rows[lane] = dropout_row(*p.seed, b, h, static_cast<uint32_t>(first + lane));
  }
  Vec keep(const uint32_t* rows, int64_t j) const {
    const C factor = static_cast<C>(p.keep_factor);
    Vec result{};
    for (int lane = 0; lane < lanes; lane++)
      result[lane] = mix(rows[lane] ^ static_cast<uint32_t>(j)) < p.drop_below ? C(0) : factor;
    return result;
  }
};

// Keys that any of the queries at positions first … last see, cut to [low, high).
struct Range {
  int64_t low, high;
  Range(int64_t first, int64_t last, int64_t window, int64_t low, int64_t high)
      : low(std::max(low, first - window + 1)), high(std::min(high, last + 1)) {}
  int64_t size() const { return std::max<int64_t>(0, high - low); }
};

}  // namespace equimini
