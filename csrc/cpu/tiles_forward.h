// Wide windows on the CPU, forward: O = softmax(Q Kᵀ) V with a running maximum, block by block.
#pragma once
#include "tiles.h"

namespace equimini {

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
                nullptr, 1 / l[i]);
      static_cast<C*>(p.lse)[(b * p.h + h) * p.n_q + query] = m[i] + std::log(l[i]);
    }
  }
}

}  // namespace equimini
