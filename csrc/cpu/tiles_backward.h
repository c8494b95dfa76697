// Wide windows on the CPU, backward: an item owns the dQ, dK and dV of its chunk.
#pragma once
#include "tiles.h"

namespace equimini {

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
                   nullptr);
    t.lse[i] = static_cast<const C*>(p.lse)[(head.b * p.h + head.h) * p.n_q + query];
    load_row<T, C>(t.scores, o, p.d, head.width, nullptr);
    for (int64_t c = 0; c < p.d; c++) t.delta[i] += t.grad[i * head.width + c] * t.scores[c];
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
                  t.dq + i * width, p.d, head.turn.to(p, start + i), static_cast<C>(p.scale));
    }
    for (int64_t j = chunk; j < chunk_end; j++) {
      const int64_t row = p.contiguous_row(b, j, h, p.n_k), from = (j - chunk) * width;
      store_row(static_cast<T*>(p.dk) + row, t.dk + from, p.d, head.turn.to(p, j));
      store_row<T, C>(static_cast<T*>(p.dv) + row, t.dv + from, p.d, nullptr);
    }
  }
}

}  // namespace equimini
