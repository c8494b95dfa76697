// Sampling's products on the CPU: the flow head, and one token's way through the transformer, for
// a handful of rows.
//
// With one picture a layer has one or two rows, so that its time is that of reading its weights,
// once per column or step, from the L2 and L3 caches, if calls are few.  Hence
// - weights lie in *panels* of 16 outputs, inputs in order, one panel behind the other and one
//   layer behind the other, in the order in which they are read: one stream through memory;
// - one call runs all layers; what lies between them stays in the L1 and L2 caches;
// - threads share rows, where there are many, and meet once per call.  Where there are few they
//   share the panels of large layers (2 MB and more; 8 MB alone), and meet at every one.
//
// A sum runs over its inputs in order, whatever the number of rows and threads, so a picture is
// the same in any batch, bit for bit.  Weights are float32 or bfloat16; all else is float32.
#pragma once
#include "attention.h"
#include "rows.h"

namespace equimini {

constexpr int kPanel = 16;                           // outputs of a panel
constexpr int kParts = kPanel / kLanes<float>;       // vectors of a panel
constexpr int kGroup = std::max(2, 12 / kParts);     // rows whose sums fit into the registers
constexpr int64_t kChunk = 48;                       // rows that pass through all layers together
constexpr int64_t kShared = 1 << 19;                 // weights of a layer that threads share

using Vec = Simd<float>::Vec;

inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

template <class T>
Vec load(const T* from) {
  Vec x;
  read(x, from);
  return x;
}

// y[r, n] = bias[n] + Σ_k x[r, k] · w[n / 16, k, n % 16] for R rows and the outputs of N panels.
template <int R, int N, class T>
inline void panels(float* y, int64_t y_row, const float* x, int64_t x_row, const T* w,
                   const float* bias, int64_t in) {
  constexpr int lanes = kLanes<float>, C = N * kParts;
  Vec sum[R][C];  // in registers, if every loop over it is unrolled before all else (GCC)
#pragma GCC unroll 16
  for (int i = 0; i < R * C; i++) sum[i / C][i % C] = load(bias + i % C * lanes);
  for (int64_t k = 0; k < in; k++) {
    for (int i = 0; i < N && N * sizeof(T) < 12; i++)  // fetch the next panels; of three of float32
      __builtin_prefetch(w + ((N + i) * in + k) * kPanel);  // the processor does by itself
    Vec w_k[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++)
      w_k[c] = load(w + (c / kParts * in + k) * kPanel + c % kParts * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < R * C; i++) sum[i / C][i % C] += x[i / C * x_row + k] * w_k[i % C];
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * C; i++)
    *reinterpret_cast<Vec*>(y + i / C * y_row + i % C * lanes) = sum[i / C][i % C];
}

// The same for `count` panels and `rows` ≤ R rows.
template <int R, class T>
inline void group(int64_t rows, int64_t count, float* y, int64_t y_row, const float* x,
                  int64_t x_row, const T* w, const float* bias, int64_t in) {
  if constexpr (R > 1)
    if (rows < R) return group<R - 1>(rows, count, y, y_row, x, x_row, w, bias, in);
  constexpr int N = R == 1 ? 8 / kParts : std::max(1, 12 / (R * kParts));  // enough sums
  int64_t p = 0;
  for (; p + N <= count; p += N)
    panels<R, N>(y + p * kPanel, y_row, x, x_row, w + p * in * kPanel, bias + p * kPanel, in);
  for (; p < count; p++)
    panels<R, 1>(y + p * kPanel, y_row, x, x_row, w + p * in * kPanel, bias + p * kPanel, in);
}

inline Vec silu(Vec x) {
  const Vec e = exp_lanes(x > 0 ? -x : x);  // ≤ 1
  return x * (x > 0 ? 1 / (1 + e) : e / (1 + e));
}
// x·Φ(x), Φ = (1 + erf(x/√2))/2; erf as a quotient of polynomials (Eigen's), to 3e-7.
inline Vec gelu(Vec x) {
  constexpr float over[] = {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                            -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  constexpr float under[] = {-2.13374055278905e-04f, -1.68282697438203e-03f,
                             -7.37332916720468e-03f, -1.42647390514189e-02f};
  Vec t = x * 0.70710678118654752f;
  t = t > 4 ? Vec{} + 4 : t < -4 ? Vec{} - 4 : t;
  Vec p = Vec{} - 2.72614225801306e-10f, q = Vec{} - 1.45660718464996e-05f;
  for (float a : over) p = p * (t * t) + a;
  for (float a : under) q = q * (t * t) + a;
  return 0.5f * x * (1 + t * p / q);
}

// Rows of floats, contiguous but for padding to whole panels.
struct Rows {
  float* data;
  int64_t count, width, step;  // step: from one row to the next
  float* operator[](int64_t r) const { return data + r * step; }
  template <class F>
  void each(F f) const {  // vector by vector, padding included
    for (int64_t r = 0; r < count; r++)
      for (int64_t c = 0; c < padded(width); c += kLanes<float>) {
        Vec& x = *reinterpret_cast<Vec*>(data + r * step + c);
        x = f(x);
      }
  }
};

// Weights in the order in which they are read: matrices in panels; biases and norms.
template <class T>
struct Weights {
  const T* matrix;
  const float* vector;
  const Parallel& parallel;
  int64_t shared = kShared;

  // y = x·Wᵀ + b
  void linear(const Rows& y, const Rows& x) {
    const int64_t count = padded(y.width) / kPanel, in = x.width;
    const int64_t grain = in * y.width < shared ? count : kShared / 4 / (in * kPanel) + 1;
    const auto part = [&](int64_t begin, int64_t end) {
      // many rows: panel by panel, which then stays in the L1 cache
      const int64_t most = x.count > kGroup ? 1 : end - begin;
      for (int64_t p = begin; p < end; p += most)
        for (int64_t r = 0; r < x.count; r += kGroup)
          group<kGroup>(std::min<int64_t>(kGroup, x.count - r), most, y[r] + p * kPanel, y.step,
                        x[r], x.step, matrix + p * in * kPanel, vector + p * kPanel, in);
    };
    grain < count ? parallel.run(count, grain, part) : part(0, count);
    matrix += count * in * kPanel, vector += count * kPanel;
  }

  // y = LN(x) ∘ weight + bias; they lie as: ε (a panel of it), weight, bias
  void norm(const Rows& y, const Rows& x) {
    const float *weight = vector + kPanel, *bias = weight + padded(x.width);
    normalize(y, x, *vector);
    for (int64_t r = 0; r < y.count; r++)
      for (int64_t c = 0; c < y.width; c++) y[r][c] = y[r][c] * weight[c] + bias[c];
    vector = bias + padded(x.width);
  }

  static void normalize(const Rows& y, const Rows& x, float eps) {
    for (int64_t r = 0; r < x.count; r++) {
      const float* from = x[r];
      float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < x.width; c++) sum += from[c];
      const float mean = sum / x.width;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < x.width; c++) squares += (from[c] - mean) * (from[c] - mean);
      const float factor = 1 / std::sqrt(squares / x.width + eps);
      for (int64_t c = 0; c < x.width; c++) y[r][c] = (from[c] - mean) * factor;
    }
  }
};

inline Rows take(Scratch<float>& scratch, int64_t rows, int64_t width) {
  return {scratch.take(rows * padded(width)), rows, width, padded(width)};
}

inline void copy_rows(const Rows& to, const float* from, int64_t step) {
  for (int64_t r = 0; r < to.count; r++) std::copy_n(from + r * step, to.width, to[r]);
}

// Runs body(first, count) over chunks of rows, on several threads from 12 rows and some 0.3 ms on.
template <class F>
void over_rows(int64_t rows, int64_t weights, const Parallel& parallel, F body) {
  const int64_t threads = std::max<int64_t>(
      1, std::min<int64_t>({parallel.threads, rows / 6, rows * weights >> 22}));
  const int64_t pieces = threads * ((rows + threads * kChunk - 1) / (threads * kChunk));
  const int64_t size = (rows + pieces - 1) / pieces, chunks = (rows + size - 1) / size;
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i * size, std::min(size, rows - i * size));
  };
  threads > 1 ? parallel.run(chunks, 1, part) : part(0, chunks);
}

// A layer by itself: y (rows, padded(out)) of x (rows, in).
template <class T>
void linear(float* y, const float* x, int64_t rows, int64_t in, int64_t out, const T* matrix,
            const float* vector, const Parallel& parallel) {
  over_rows(rows, in * out, parallel, [&](int64_t first, int64_t count) {
    Weights<T>{matrix, vector, parallel, 4 * kShared}.linear(  // to wake a thread takes long
        {y + first * padded(out), count, out, padded(out)},
        {const_cast<float*>(x + first * in), count, in, in});
  });
}

// The flow head ------------------------------------------------------------------------------

struct Head {
  int64_t rows, channels, width, depth;
  const float *x, *modulations;  // (rows, channels), (rows, (3·depth + 2)·width)
  float* v;                      // (rows, channels)
  int64_t weights() const { return 2 * depth * width * width; }
};

// FlowHead.velocity: x is x_in(x), then += gate ∘ MLP((1 + scale) ∘ LN(x) + shift), block by block.
template <class T>
void run_rows(const Head& p, int64_t first, int64_t count, Weights<T> weights) {
  Scratch<float> scratch(count * (3 * padded(p.width) + padded(p.channels)));
  const Rows x = take(scratch, count, p.width), h = take(scratch, count, p.width);
  const Rows m = take(scratch, count, p.width), v = take(scratch, count, p.channels);
  const int64_t step = (3 * p.depth + 2) * p.width;
  const float* modulation = p.modulations + first * step;
  const auto modulate = [&] {  // h = shift + (1 + scale) ∘ h
    for (int64_t r = 0; r < count; r++)
      for (int64_t c = 0; c < p.width; c++)
        h[r][c] = modulation[r * step + c] + modulation[r * step + p.width + c] * h[r][c];
  };
  copy_rows(v, p.x + first * p.channels, p.channels);
  weights.linear(x, v);
  for (int64_t block = 0; block < p.depth; block++, modulation += 3 * p.width) {
    weights.norm(h, x);
    modulate();
    weights.linear(m, h);
    m.each(silu);
    weights.linear(h, m);
    for (int64_t r = 0; r < count; r++)
      for (int64_t c = 0; c < p.width; c++)
        x[r][c] += modulation[r * step + 2 * p.width + c] * h[r][c];
  }
  weights.normalize(h, x, *weights.vector);
  weights.vector += kPanel;
  modulate();
  weights.linear(v, h);
  for (int64_t r = 0; r < count; r++) std::copy_n(v[r], p.channels, p.v + (first + r) * p.channels);
}

// A token's way through the transformer ------------------------------------------------------

struct Token {
  int64_t rows, channels, width, heads, window, layers, known, class_tokens;
  const float* x;                             // (rows, channels)
  const float *const *past, *const *classes;  // k, v, k, v, … of the layers:
                                              // (rows, known, width), (rows, class_tokens, width)
  const float *cos, *sin;                     // of positions 0 … known, (known + 1, D/2)
  const float *cross_cos, *cross_sin;         // of the position that cross-attention sees, (D/2,)
  float* z;                                   // (rows, width)
  float* cache;                               // (2·layers, rows, min(known + 1, window − 1), width)
  int64_t weights() const { return 14 * layers * width * width; }
  int64_t head_dim() const { return width / heads; }
  int64_t kept() const { return std::min(known + 1, window - 1); }
};

// One head of D channels, its pairs turned by angles (D/2,): RoPE.
inline void turn_pairs(float* __restrict to, const float* __restrict from, int64_t d,
                       const float* cos, const float* sin) {
  for (int64_t c = 0; c < d; c += 2) {
    to[c] = from[c] * cos[c / 2] - from[c + 1] * sin[c / 2];
    to[c + 1] = from[c + 1] * cos[c / 2] + from[c] * sin[c / 2];
  }
}

// out = Σ_j softmax_j(q · k_j / √D) v_j over n keys of one head.
inline void attend(float* out, const float* q, const float* k, int64_t k_step, const float* v,
                   int64_t v_step, int64_t n, int64_t d, float* weights) {
  const float scale = 1 / std::sqrt(float(d));
  float most = -INFINITY, total = 0;
  for (int64_t j = 0; j < n; j++) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t c = 0; c < d; c++) s += q[c] * k[j * k_step + c];
    most = std::max(most, weights[j] = s * scale);
  }
  for (int64_t j = 0; j < n; j++) total += weights[j] = std::exp(weights[j] - most);
  for (int64_t j = 0; j < n; j++) weights[j] /= total;
  std::fill_n(out, d, 0.0f);
  for (int64_t j = 0; j < n; j++)
    for (int64_t c = 0; c < d; c++) out[c] += weights[j] * v[j * v_step + c];
}

// A row of self-attention to the columns before and to itself; keeps what the next ones see.
inline void self_attention(const Token& p, int64_t layer, int64_t row, float* out,
                           const float* qkv, float* scratch) {
  const int64_t d = p.head_dim(), w = p.width, n = p.known + 1, kept = p.kept();
  float *k = scratch, *v = k + n * w, *turned = v + n * w, *q = turned + n * d, *weights = q + d;
  for (int i = 0; i < 2; i++) {
    float* all = i ? v : k;
    if (p.known) std::copy_n(p.past[2 * layer + i] + row * p.known * w, p.known * w, all);
    std::copy_n(qkv + (1 + i) * w, w, all + p.known * w);
    std::copy_n(all + (n - kept) * w, kept * w,
                p.cache + ((2 * layer + i) * p.rows + row) * kept * w);
  }
  for (int64_t h = 0; h < w; h += d) {
    for (int64_t j = 0; j < n; j++)
      turn_pairs(turned + j * d, k + j * w + h, d, p.cos + j * d / 2, p.sin + j * d / 2);
    turn_pairs(q, qkv + h, d, p.cos + p.known * d / 2, p.sin + p.known * d / 2);
    attend(out + h, q, turned, d, v + h, w, n, d, weights);
  }
}

inline void cross_attention(const Token& p, int64_t layer, int64_t row, float* out, const float* q,
                            float* scratch) {
  const int64_t d = p.head_dim(), w = p.width, at = row * p.class_tokens * w;
  for (int64_t h = 0; h < w; h += d) {
    turn_pairs(scratch, q + h, d, p.cross_cos, p.cross_sin);
    attend(out + h, scratch, p.classes[2 * layer] + at + h, w, p.classes[2 * layer + 1] + at + h, w,
           p.class_tokens, d, scratch + d);
  }
}

// Generator.forward of one token.
template <class T>
void run_rows(const Token& p, int64_t first, int64_t count, Weights<T> weights) {
  const int64_t w = p.width;
  const int64_t around = (p.known + 1) * (2 * w + p.head_dim() + 1) + p.head_dim() + p.class_tokens;
  Scratch<float> pool(count * (3 * padded(w) + padded(3 * w) + padded(4 * w) + padded(p.channels)) +
                      around);
  const Rows x = take(pool, count, w), h = take(pool, count, w), o = take(pool, count, w);
  const Rows qkv = take(pool, count, 3 * w), m = take(pool, count, 4 * w);
  const Rows in = take(pool, count, p.channels);
  float* scratch = pool.take(around);
  const auto add = [&](const Rows& y) {  // x += y
    for (int64_t r = 0; r < count; r++)
      for (int64_t c = 0; c < w; c++) x[r][c] += y[r][c];
  };
  copy_rows(in, p.x + first * p.channels, p.channels);
  weights.linear(x, in);
  weights.norm(x, x);
  for (int64_t layer = 0; layer < p.layers; layer++) {
    weights.norm(h, x);
    weights.linear(qkv, h);
    for (int64_t r = 0; r < count; r++)
      self_attention(p, layer, first + r, o[r], qkv[r], scratch);
    weights.linear(h, o);
    add(h);
    weights.norm(h, x);
    weights.linear(o, h);
    for (int64_t r = 0; r < count; r++)
      cross_attention(p, layer, first + r, h[r], o[r], scratch);
    weights.linear(o, h);
    add(o);
    weights.norm(h, x);
    weights.linear(m, h);
    m.each(gelu);
    weights.linear(h, m);
    add(h);
  }
  weights.norm(h, x);
  for (int64_t r = 0; r < count; r++) std::copy_n(h[r], w, p.z + (first + r) * w);
}

// All rows of a Head or a Token.
template <class T, class Part>
void run(const Part& p, const T* matrix, const float* vector, const Parallel& parallel) {
  over_rows(p.rows, p.weights(), parallel, [&](int64_t first, int64_t count) {
    run_rows<T>(p, first, count, {matrix, vector, parallel});
  });
}

}  // namespace equimini
