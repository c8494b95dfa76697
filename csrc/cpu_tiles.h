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
#include "cpu_common.h"

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

  Head(const Attention& p, int64_t b, int64_t h)
      : p(p), b(b), h(h), width((p.d + lanes - 1) / lanes * lanes),
        window(std::min(p.window, p.n_k)) {}

  const float* cos(int64_t position) const { return p.cos ? p.cos + position * p.d / 2 : nullptr; }
  const float* sin(int64_t position) const { return p.sin ? p.sin + position * p.d / 2 : nullptr; }

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
      load_row(k + j * width, p.k.row<T>(b, first + j, h), p.d, width, cos(first + j),
               sin(first + j));
      load_row<T, C>(v + j * width, p.v.row<T>(b, first + j, h), p.d, width, nullptr, nullptr);
    }
  }

  // Queries at positions first … first + count, times scale; the rest of the last strip is 0.
  void load_queries(C* q, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; i++) {
      prefetch(p.q, first + i - p.offset());
      load_row(q + i * width, p.q.row<T>(b, first + i - p.offset(), h), p.d, width, cos(first + i),
               sin(first + i), static_cast<C>(p.scale));
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

// Forward ------------------------------------------------------------------------------------

template <class C>
int64_t forward_items(const Attention& p) {
  return p.b * p.h * ((p.n_q + kTile<C> - 1) / kTile<C>);
}

// One strip meets one block: scores, softmax with a running maximum m and sum l, and O += P V.
template <class T, class C>
void forward_strip(const Head<T, C>& head, int64_t first, int64_t last, int64_t block,
                   int64_t block_end, const C* k, const C* v, const C* q_strip, C* scores, C* m,
                   C* l, C* o) {
  using Vec = typename Simd<C>::Vec;
  constexpr int lanes = kLanes<C>;
  const Range keys(first, last, head.window, block, block_end);
  if (!keys.size()) return;
  score_rows(scores, k + (keys.low - block) * head.width, q_strip, head.width, keys.size());

  Vec* s = reinterpret_cast<Vec*>(scores);
  Vec& maximum = *reinterpret_cast<Vec*>(m);
  Vec& sum = *reinterpret_cast<Vec*>(l);
  Vec highest = maximum;
  for (int64_t j = 0; j < keys.size(); j++) {
    if (!head.all_visible(first, last, keys.low + j))
      s[j] = head.visible(first, keys.low + j) ? s[j] : Vec{} - INFINITY;
    highest = s[j] > highest ? s[j] : highest;
  }
  const Vec shrink = exp_lanes(maximum - highest);
  maximum = highest;
  sum *= shrink;
  for (int64_t i = 0; i <= last - first; i++)
    for (int64_t c = 0; c < head.width; c += lanes)
      *reinterpret_cast<Vec*>(o + i * head.width + c) *= shrink[i];

  alignas(64) uint32_t rows[lanes];
  head.dropout_rows(rows, first);
  for (int64_t j = 0; j < keys.size(); j++) {
    s[j] = exp_lanes(s[j] - highest);
    sum += s[j];
    if (head.p.seed) s[j] *= head.keep(rows, keys.low + j);
  }
  for (int64_t i = 0; i <= last - first; i += kRows<C>) {
    const Range band(first + i, first + i + kRows<C> - 1, head.window, keys.low, keys.high);
    add_rows(o + i * head.width, scores + (band.low - keys.low) * lanes + i, 1, lanes,
             v + (band.low - block) * head.width, head.width, band.size());
  }
}

// Work items begin … end of the forward pass.
template <class T, class C>
void forward(const Attention& p, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<C>, tile = kTile<C>;
  const int64_t width = (p.d + lanes - 1) / lanes * lanes;
  Scratch<C> scratch(3 * tile * width + 2 * (kBlock + kScoreRows) * width +
                     (kBlock + kScoreRows) * lanes + 2 * tile);
  C *q = scratch.take(tile * width), *strips = scratch.take(tile * width);
  C *o = scratch.take(tile * width), *k = scratch.take((kBlock + kScoreRows) * width);
  C *v = scratch.take((kBlock + kScoreRows) * width);
  C *scores = scratch.take((kBlock + kScoreRows) * lanes);
  C *m = scratch.take(tile), *l = scratch.take(tile);

  for (int64_t item = begin; item < end; item++) {  // heads fastest: neighbours in memory
    const int64_t tiles = (p.n_q + tile - 1) / tile, h = item % p.h, b = item / p.h / tiles;
    const Head<T, C> head(p, b, h);
    const int64_t start = p.offset() + item / p.h % tiles * tile;  // position of the first query
    const int64_t stop = std::min(start + tile, p.n_k);
    head.load_queries(q, start, stop - start);
    head.transpose(strips, q, stop - start);
    std::fill(o, o + head.padded(stop - start) * width, C(0));
    std::fill(m, m + tile, C(kNothing));
    std::fill(l, l + tile, C(0));

    const Range keys(start, stop - 1, head.window, 0, p.n_k);
    for (int64_t block = keys.low; block < keys.high; block += kBlock) {
      const int64_t block_end = std::min<int64_t>(block + kBlock, keys.high);
      head.load_keys(k, v, block, block_end - block);
      for (int64_t i = 0; i < stop - start; i += lanes)
        forward_strip(head, start + i, std::min(start + i + lanes, stop) - 1, block, block_end, k,
                      v, strips + i * width, scores, m + i, l + i, o + i * width);
    }
    for (int64_t i = 0; i < stop - start; i++) {
      const int64_t query = start + i - p.offset();
      store_row(static_cast<T*>(p.out) + p.contiguous_row(b, query, h, p.n_q), o + i * width, p.d,
                nullptr, nullptr, 1 / l[i]);
      static_cast<C*>(p.lse)[(b * p.h + h) * p.n_q + query] = m[i] + std::log(l[i]);
    }
  }
}

// Backward -----------------------------------------------------------------------------------

// Positions in a chunk: about 4 W, so that recomputed scores cost a quarter at most.
template <class C>
int64_t chunk_length(const Attention& p) {
  const int64_t tiles = (4 * std::min(p.window, p.n_k) + kTile<C> - 1) / kTile<C>;
  return std::min(tiles * kTile<C>, (p.n_k + kTile<C> - 1) / kTile<C> * kTile<C>);
}

template <class C>
int64_t backward_items(const Attention& p) {
  return p.b * p.h * ((p.n_k + chunk_length<C>(p) - 1) / chunk_length<C>(p));
}

// Scratch of the backward pass: a tile of queries, a block of keys, the chunk's dK and dV.
template <class C>
struct Tiles {
  C *q, *q_strips, *grad, *grad_strips, *dq, *lse, *delta;  // of the tile
  C *k, *v, *scores, *dscores;                              // of the block
  C *dk, *dv;                                               // of the chunk

  static size_t size(int64_t width, int64_t chunk) {
    return 5 * kTile<C> * width + 2 * kTile<C> + 2 * (kBlock + kScoreRows) * (width + kLanes<C>) +
           2 * (chunk + kRows<C>) * width;
  }
  Tiles(Scratch<C>& scratch, int64_t width, int64_t chunk) {
    for (C** piece : {&q, &q_strips, &grad, &grad_strips, &dq})
      *piece = scratch.take(kTile<C> * width);
    for (C** piece : {&lse, &delta}) *piece = scratch.take(kTile<C>);
    for (C** piece : {&k, &v}) *piece = scratch.take((kBlock + kScoreRows) * width);
    for (C** piece : {&scores, &dscores}) *piece = scratch.take((kBlock + kScoreRows) * kLanes<C>);
    for (C** piece : {&dk, &dv}) *piece = scratch.take((chunk + kRows<C>) * width);
  }
};

// One strip, queries first … last, i rows into the tile, meets the block's keys [low, high):
// dQ of the strip, and dK, dV of the keys from `chunk` on, gain what these pairs contribute.
template <class T, class C>
void backward_strip(const Head<T, C>& head, const Tiles<C>& t, int64_t i, int64_t first,
                    int64_t last, int64_t block, int64_t low, int64_t high, int64_t chunk) {
  using Vec = typename Simd<C>::Vec;
  constexpr int lanes = kLanes<C>;
  const int64_t width = head.width;
  const Range keys(first, last, head.window, low, high);
  if (!keys.size()) return;
  score_rows(t.scores, t.k + (keys.low - block) * width, t.q_strips + i * width, width,
             keys.size());
  score_rows(t.dscores, t.v + (keys.low - block) * width, t.grad_strips + i * width, width,
             keys.size());

  Vec *s = reinterpret_cast<Vec*>(t.scores), *ds = reinterpret_cast<Vec*>(t.dscores);
  const Vec lse = *reinterpret_cast<Vec*>(t.lse + i), delta = *reinterpret_cast<Vec*>(t.delta + i);
  alignas(64) uint32_t rows[lanes];
  head.dropout_rows(rows, first);
  for (int64_t j = 0; j < keys.size(); j++) {
    Vec p = exp_lanes(s[j] - lse);
    if (!head.all_visible(first, last, keys.low + j))
      p = head.visible(first, keys.low + j) ? p : Vec{};
    const Vec keep = head.p.seed ? head.keep(rows, keys.low + j) : Vec{} + C(1);
    s[j] = p * keep;
    ds[j] = p * (ds[j] * keep - delta);
  }
  std::fill(s + keys.size(), s + keys.size() + kRows<C>, Vec{});  // the last group's missing keys
  std::fill(ds + keys.size(), ds + keys.size() + kRows<C>, Vec{});

  for (int64_t r = 0; r <= last - first; r += kRows<C>) {
    const Range band(first + r, first + r + kRows<C> - 1, head.window, keys.low, keys.high);
    add_rows(t.dq + (i + r) * width, t.dscores + (band.low - keys.low) * lanes + r, 1, lanes,
             t.k + (band.low - block) * width, width, band.size());
  }
  for (int64_t j = std::max(keys.low, chunk); j < keys.high; j += kRows<C>) {
    const int64_t from = std::max<int64_t>(0, j - first);  // queries that see a key of the rows
    const int64_t to = std::min(last - first + 1, j + kRows<C> - 1 + head.window - first);
    const int64_t weight = (j - keys.low) * lanes + from, row = (i + from) * width;
    add_rows(t.dv + (j - chunk) * width, t.scores + weight, lanes, 1, t.grad + row, width,
             to - from);
    add_rows(t.dk + (j - chunk) * width, t.dscores + weight, lanes, 1, t.q + row, width,
             to - from);
  }
}

// Queries at positions start … stop: their rotated rows, gradients, log-sum-exp and
// δ_i = o_i · do_i.
template <class T, class C>
void load_query_tile(const Head<T, C>& head, const Tiles<C>& t, int64_t start, int64_t stop) {
  const Attention& p = head.p;
  head.load_queries(t.q, start, stop - start);
  std::fill(t.grad, t.grad + head.padded(stop - start) * head.width, C(0));
  std::fill(t.lse, t.lse + kTile<C>, C(0));
  std::fill(t.delta, t.delta + kTile<C>, C(0));
  for (int64_t i = 0; i < stop - start; i++) {
    const int64_t query = start + i - p.offset();
    const T* o = static_cast<const T*>(p.out) + p.contiguous_row(head.b, query, head.h, p.n_q);
    head.prefetch(p.grad, query);
    load_row<T, C>(t.grad + i * head.width, p.grad.row<T>(head.b, query, head.h), p.d, head.width,
                   nullptr, nullptr);
    t.lse[i] = static_cast<const C*>(p.lse)[(head.b * p.h + head.h) * p.n_q + query];
    for (int64_t c = 0; c < p.d; c++)
      t.delta[i] += t.grad[i * head.width + c] * static_cast<C>(o[c]);
  }
  head.transpose(t.q_strips, t.q, stop - start);
  head.transpose(t.grad_strips, t.grad, stop - start);
}

// Work items begin … end of the backward pass.
template <class T, class C>
void backward(const Attention& p, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<C>, tile = kTile<C>;
  const int64_t width = (p.d + lanes - 1) / lanes * lanes, length = chunk_length<C>(p);
  const int64_t chunks = (p.n_k + length - 1) / length;
  Scratch<C> scratch(Tiles<C>::size(width, length));
  const Tiles<C> t(scratch, width, length);

  for (int64_t item = begin; item < end; item++) {
    const int64_t h = item % p.h, b = item / p.h / chunks;
    const Head<T, C> head(p, b, h);
    const int64_t chunk = item / p.h % chunks * length;
    const int64_t chunk_end = std::min(chunk + length, p.n_k);
    std::fill(t.dk, t.dk + (chunk_end - chunk) * width, C(0));
    std::fill(t.dv, t.dv + (chunk_end - chunk) * width, C(0));

    const int64_t last = std::min(chunk_end + head.window - 1, p.n_k);
    for (int64_t start = std::max(chunk, p.offset()), stop; start < last; start = stop) {
      const bool own = start < chunk_end;  // otherwise behind the chunk, for dK and dV alone
      stop = std::min(start + tile, own ? chunk_end : last);
      load_query_tile(head, t, start, stop);
      std::fill(t.dq, t.dq + head.padded(stop - start) * width, C(0));
      const Range keys(start, stop - 1, head.window, own ? 0 : chunk, own ? p.n_k : chunk_end);
      for (int64_t block = keys.low; block < keys.high; block += kBlock) {
        const int64_t block_end = std::min<int64_t>(block + kBlock, keys.high);
        head.load_keys(t.k, t.v, block, block_end - block);
        for (int64_t i = 0; i < stop - start; i += lanes)
          backward_strip(head, t, i, start + i, std::min(start + i + lanes, stop) - 1, block,
                         block, block_end, chunk);
      }
      for (int64_t i = 0; own && i < stop - start; i++)
        store_row(static_cast<T*>(p.dq) + p.contiguous_row(b, start + i - p.offset(), h, p.n_q),
                  t.dq + i * width, p.d, head.cos(start + i), head.sin(start + i),
                  static_cast<C>(p.scale));
    }
    for (int64_t j = chunk; j < chunk_end; j++) {
      const int64_t row = p.contiguous_row(b, j, h, p.n_k), from = (j - chunk) * width;
      store_row(static_cast<T*>(p.dk) + row, t.dk + from, p.d, head.cos(j), head.sin(j));
      store_row<T, C>(static_cast<T*>(p.dv) + row, t.dv + from, p.d, nullptr, nullptr);
    }
  }
}

}  // namespace equimini
