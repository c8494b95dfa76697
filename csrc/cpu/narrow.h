// Windowed causal attention on the CPU for narrow windows, W ≤ kNarrow, forward and backward.
//
// At the model's shape (W = 4, D = 64) there is little to compute and much to move: a vector of
// queries, as tiles.h has it, would meet W + lanes − 1 keys of which W are wanted, and would
// read one head after the other from rows that lie far apart.  Here a work item is one batch
// entry and a chunk of positions, all heads; it walks along the tokens, reads each token's q, k
// and v once and in the order of memory, and keeps the last W of them in rings (converted,
// rotated) that stay in the L1 or L2 cache.  A query meets exactly the keys that it sees, so
// there is no mask:
//
//     s[w, h]  = Σ_d q[h, d] · k[w, h, d]      a vector of partial sums per score; those of as
//                                              many scores as there are lanes are folded together
//     p[w, h]  = softmax of s over w           lanes are heads
//     o[h]     = Σ_w p[w, h] · v[w, h]         lanes are channels
//
// All scores of a query are at hand at once, so the backward pass computes its softmax anew and
// δ = Σ_w p[w] dp[w] with it: it reads neither the output nor the log-sum-exp.  The gradients of
// key j are complete when query j + W − 1 has come by: q, dout and the weights of the last W
// queries wait in rings too, and dk[j], dv[j] are sums over them, written once.  Queries up to
// W − 1 behind a chunk are computed again: no atomics, and the same bits in every run and for
// every length of the chunks.
#pragma once
#include <utility>

#include "rows.h"

namespace equimini {

// The widest window; measured with AVX-512: for D = 64 and long sequences this kernel takes less
// time than the tiles up to W = 16, for D = 32 up to W = 8.
constexpr int kNarrow = 12;
constexpr int kHeld = 4;  // vectors of a row that loops hold at once

// One level of sum_lanes: lanes whose number has the bit Step sum b's pairs, the others a's.
template <class C, int Step, int... i>
inline typename Simd<C>::Vec fold(typename Simd<C>::Vec a, typename Simd<C>::Vec b,
                                  std::integer_sequence<int, i...>) {
  constexpr int lanes = kLanes<C>;
  return pick<C, (i & Step ? i + lanes : i)...>(a, b) +
         pick<C, (i & Step ? (i ^ Step) + lanes : i ^ Step)...>(a, b);
}

// result[r] = Σ_lane rows[r][lane], for as many rows as there are lanes; changes them.
template <class C, int Step = kLanes<C> / 2>
inline typename Simd<C>::Vec sum_lanes(typename Simd<C>::Vec* rows) {
  for (int r = 0; r < Step; r++)
    rows[r] = fold<C, Step>(rows[r], rows[r + Step], Lanes<C>());
  if constexpr (Step > 1) return sum_lanes<C, Step / 2>(rows);
  else return rows[0];
}

template <class C>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// D and the length of a row in scratch memory: numbers that the compiler knows, or (D = 0) not.
template <class C, int D>
struct RowSize {
  static constexpr int64_t d = D, width = whole_vectors<C>(D);
  explicit RowSize(const Attention&) {}
};
template <class C>
struct RowSize<C, 0> {
  const int64_t d, width;
  explicit RowSize(const Attention& p) : d(p.d), width(whole_vectors<C>(p.d)) {}
};

// The walk along one batch entry's tokens: its rings, and what happens at a token.
template <class T, class C, int D>
struct Walk : RowSize<C, D> {
  using RowSize<C, D>::d, RowSize<C, D>::width;
  using Vec = typename Simd<C>::Vec;
  static constexpr int lanes = kLanes<C>;

  const Attention& p;
  const int64_t all_rows, heads, window;  // length of H rows; H padded; W
  int64_t b = 0;
  Scratch<C> scratch;
  C *k, *v, *q, *grad;   // rings of the last W tokens, (W, H, width)
  C *weights, *dscores;  // rings of the last W queries, (W, W, heads): query, key of its window;
                         // forward has one query at a time
  C *scores, *row, *lse;
  mutable Turn<C> turn;

  explicit Walk(const Attention& p)
      : RowSize<C, D>(p), p(p), all_rows(p.h * width), heads(whole_vectors<C>(p.h)),
        window(std::min(p.window, p.n_k)),
        scratch(window * (4 * all_rows + 2 * window * heads) + whole_vectors<C>(window * p.h) +
                width + heads) {
    for (C** ring : {&k, &v, &q, &grad}) *ring = scratch.take(window * all_rows);
    for (C** ring : {&weights, &dscores}) {
      *ring = scratch.take(window * window * heads);
      std::fill_n(*ring, window * window * heads, C(0));  // heads that are padding stay finite
    }
    scores = scratch.take(whole_vectors<C>(window * p.h));
    row = scratch.take(width), lse = scratch.take(heads);
  }

  static Vec& vec(C* x) { return *reinterpret_cast<Vec*>(x); }
  static const Vec& vec(const C* x) { return *reinterpret_cast<const Vec*>(x); }
  int64_t first_key(int64_t i) const { return std::max<int64_t>(0, i - window + 1); }
  C* slot(C* ring, int64_t position) const { return ring + position % window * all_rows; }
  C* pairs(C* ring, int64_t i) const { return ring + i % window * window * heads; }

  // Row n of x, all heads, becomes a token of a ring.
  void load(C* to, const Heads& x, int64_t n, const Turn<C>* turn, C by = 1) const {
    for (int64_t h = 0; h < p.h; h++) {
      const T* from = x.row<T>(b, n, h);
      for (int64_t c = 0; c < d; c += 64 / sizeof(T)) __builtin_prefetch(from + x.token + c);
      load_row(to + h * width, from, d, width, turn, by);
    }
  }
  void load_key(int64_t j) const {
    load(slot(k, j), p.k, j, turn.to(p, j));
    load(slot(v, j), p.v, j, nullptr);
  }
  void load_query(int64_t i) const {
    load(slot(q, i), p.q, i - p.offset(), turn.to(p, i), static_cast<C>(p.scale));
  }

  // Partial sums of x · y.
  Vec dot(const C* x, const C* y) const {
    Vec sum[kHeld] = {};
    int64_t c = 0;
    for (; c + kHeld * lanes <= width; c += kHeld * lanes)
      for (int r = 0; r < kHeld; r++) sum[r] += vec(x + c + r * lanes) * vec(y + c + r * lanes);
    for (; c < width; c += lanes) sum[0] += vec(x + c) * vec(y + c);
    for (int r = 1; r < kHeld; r++) sum[0] += sum[r];
    return sum[0];
  }

  // out[j, h] = rows[h] · keys[j, h] for the keys j that query i sees.
  void products(C* out, const C* rows, C* keys, int64_t i) const {
    Vec partial[lanes] = {};
    int64_t pair = 0;
    for (int64_t j = first_key(i); j <= i; j++) {
      const C *x = rows, *y = slot(keys, j);
      for (int64_t h = 0; h < p.h; h++, pair++, x += width, y += width) {
        if (pair && pair % lanes == 0) vec(scores + pair - lanes) = sum_lanes<C>(partial);
        partial[pair % lanes] = dot(x, y);
      }
    }
    vec(scores + (pair - 1) / lanes * lanes) = sum_lanes<C>(partial);
    for (int64_t at = 0; at < pair; at += p.h, out += heads)
      std::copy(scores + at, scores + at + p.h, out);
  }

  // The scores of query i become weights; `log_sums`, if given, gets the heads' log-sum-exps.
  void softmax(C* s, int64_t i, C* log_sums = nullptr) const {
    const int64_t end = (i + 1 - first_key(i)) * heads;
    for (int64_t h = 0; h < heads; h += lanes) {
      Vec highest = vec(s + h), sum{};
      for (int64_t w = h + heads; w < end; w += heads)
        highest = vec(s + w) > highest ? vec(s + w) : highest;
      for (int64_t w = h; w < end; w += heads)
        sum += vec(s + w) = exp_lanes(vec(s + w) - highest);
      for (int64_t w = h; w < end; w += heads) vec(s + w) /= sum;
      for (int lane = 0; log_sums && lane < lanes; lane++)
        log_sums[h + lane] = highest[lane] + std::log(sum[lane]);
    }
  }

  // What dropout multiplies the weights of key j with, for query i and the heads from h on.
  Vec keep(int64_t h, int64_t i, int64_t j) const {
    const C factor = static_cast<C>(p.keep_factor);
    Vec result{};
    for (int lane = 0; lane < lanes; lane++) {
      const uint32_t hash = mix(dropout_row(*p.seed, b, h + lane, i) ^ static_cast<uint32_t>(j));
      result[lane] = hash < p.drop_below ? C(0) : factor;
    }
    return result;
  }
  void drop(C* s, int64_t i) const {
    for (int64_t j = first_key(i); p.seed && j <= i; j++, s += heads)
      for (int64_t h = 0; h < heads; h += lanes) vec(s + h) *= keep(h, i, j);
  }

  // The rows that a sum runs over, all heads of each, and their weights.
  struct Terms {
    const C *a[kNarrow], *x[kNarrow];  // (heads), (H, width)
    int64_t count = 0;
    void add(const C* weights, const C* rows) { a[count] = weights, x[count++] = rows; }
  };

  // row = Σ_n a[n][h] · x[n][h]
  void combine(const Terms& terms, int64_t h) const {
    int64_t c = 0;
    for (; c + kHeld * lanes <= width; c += kHeld * lanes) combine_vectors<kHeld>(terms, h, c);
    for (; c < width; c += lanes) combine_vectors<1>(terms, h, c);
  }
  template <int V>
  void combine_vectors(const Terms& terms, int64_t h, int64_t c) const {
    Vec sum[V] = {};
    for (int64_t n = 0; n < terms.count; n++)
      for (int r = 0; r < V; r++)
        sum[r] += terms.a[n][h] * vec(terms.x[n] + h * width + c + r * lanes);
    for (int r = 0; r < V; r++) vec(row + c + r * lanes) = sum[r];
  }

  // The sums for all heads become one token of a contiguous tensor, from its first element on.
  void store(void* y, int64_t at, const Terms& terms, const Turn<C>* turn, C by = 1) const {
    T* to = static_cast<T*>(y) + at;
    for (int64_t h = 0; h < p.h; h++, to += d) {
      for (int64_t c = 0; c < d; c += 64 / sizeof(T)) __builtin_prefetch(to + p.h * d + c, 1);
      combine(terms, h);
      store_row(to, row, d, turn, by);
    }
  }

  Terms over_keys(C* a, C* keys, int64_t i) const {  // that query i sees; a (W, heads)
    Terms terms;
    for (int64_t j = first_key(i); j <= i; j++, a += heads) terms.add(a, slot(keys, j));
    return terms;
  }
  Terms over_queries(C* a, C* queries, int64_t j) const {  // that see key j; a and queries: rings
    Terms terms;
    for (int64_t i = std::max(j, p.offset()); i < std::min(j + window, p.n_k); i++)
      terms.add(pairs(a, i) + (j - first_key(i)) * heads, slot(queries, i));
    return terms;
  }
  int64_t query_at(int64_t i) const { return p.contiguous_row(b, i - p.offset(), 0, p.n_q); }
  int64_t key_at(int64_t j) const { return p.contiguous_row(b, j, 0, p.n_k); }

  void forward(int64_t first, int64_t last) const {  // queries at positions first … last − 1
    for (int64_t n = first_key(first); n < last; n++) {
      load_key(n);
      if (n < first) continue;
      load_query(n);
      products(weights, slot(q, n), k, n);
      softmax(weights, n, lse);
      drop(weights, n);
      store(p.out, query_at(n), over_keys(weights, v, n), nullptr);
      for (int64_t h = 0; h < p.h; h++)
        static_cast<C*>(p.lse)[(b * p.h + h) * p.n_q + n - p.offset()] = lse[h];
    }
  }

  // s becomes the weights that multiplied v, ds (as products left it) the scores' gradients.
  void differentiate(C* s, C* ds, int64_t i) const {
    softmax(s, i);
    const int64_t j = first_key(i), count = i + 1 - j;
    for (int64_t h = 0; h < heads; h += lanes) {
      Vec kept[kNarrow], delta{};
      for (int64_t w = 0, at = h; w < count; w++, at += heads) {
        kept[w] = p.seed ? keep(h, i, j + w) : Vec{} + C(1);
        delta += vec(s + at) * (vec(ds + at) *= kept[w]);
      }
      for (int64_t w = 0, at = h; w < count; w++, at += heads) {
        vec(ds + at) = vec(s + at) * (vec(ds + at) - delta);
        vec(s + at) *= kept[w];
      }
    }
  }

  void backward(int64_t first, int64_t last) const {  // dq, dk, dv of positions first … last − 1
    const int64_t first_query = std::max(first, p.offset());
    const int64_t end = std::min(last + window - 1, p.n_k);
    for (int64_t n = first_key(first); n < last + window - 1; n++) {
      if (n < end) load_key(n);
      if (n >= first_query && n < end) {
        load_query(n);
        load(slot(grad, n), p.grad, n - p.offset(), nullptr);
        C *s = pairs(weights, n), *ds = pairs(dscores, n);
        products(s, slot(q, n), k, n);
        products(ds, slot(grad, n), v, n);
        differentiate(s, ds, n);
        if (n < last)
          store(p.dq, query_at(n), over_keys(ds, k, n), turn.to(p, n), static_cast<C>(p.scale));
      }
      const int64_t j = n - window + 1;  // no later query sees it
      if (j >= first) {
        store(p.dk, key_at(j), over_queries(dscores, q, j), turn.to(p, j));
        store(p.dv, key_at(j), over_queries(weights, grad, j), nullptr);
      }
    }
  }
};

inline bool is_narrow(const Attention& p) { return std::min(p.window, p.n_k) <= kNarrow; }

// Positions in a work item: few where there would be fewer items than threads.
template <bool Backward>
int64_t narrow_chunk(const Attention& p, int64_t threads) {
  const int64_t share = p.b * (Backward ? p.n_k : p.n_q) / (2 * threads);
  return std::clamp<int64_t>(share, 16, 64);
}

template <bool Backward>
int64_t narrow_items(const Attention& p, int64_t chunk) {
  return p.b * (((Backward ? p.n_k : p.n_q) + chunk - 1) / chunk);
}

// Work items begin … end: chunks of one batch entry after the other.
template <bool Backward, int D, class T, class C>
void narrow(const Attention& p, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t low = Backward ? 0 : p.offset(), chunks = narrow_items<Backward>(p, chunk) / p.b;
  Walk<T, C, D> walk(p);
  for (int64_t item = begin; item < end; item++) {
    walk.b = item / chunks;
    const int64_t first = low + item % chunks * chunk;
    const int64_t last = std::min(first + chunk, p.n_k);
    if constexpr (Backward) walk.backward(first, last);
    else walk.forward(first, last);
  }
}

}  // namespace equimini
