// Windowed attention on tensor cores, for bfloat16 and float16 and wider windows.
//
// From a window of about 16 on, arithmetic outgrows the bytes, and mma.sync (16×8×16) does it.
// A block of 4 warps owns 64 positions of one sequence, a warp 16 of them.  Rows of the other
// side (keys for queries; queries for keys) pass through shared memory 32 at a time, rotated and
// rounded back to 16 bits on the way; a warp multiplies only those groups of 16 that touch its
// band of W + 15 rows.  So the wanted part of the computed scores is W / (W + 30) at worst, where
// tiles of 128×128 give W / (W + 254).  A pass asks for all of its rows (for D > 80, for one at a
// time) while other warps still compute the one before, forward at D ≤ 64 even a pass ahead (6 %
// faster on an H200 at W = 32 to 256); several blocks to a multiprocessor (4 forward for D ≤ 64, 2
// or 3 else) cover the rest of the waiting.
//
// Fragments (see matrix_multiply_add): ldmatrix reads the A operand and B = rowsᵀ as they lie,
// and transposes rows for the second product (P V, dS K, …).  Rows have 8 elements more than the
// 64, 80 or 128 for D, so that the 8 rows of a matrix lie in different banks.  The scores'
// accumulator, packed to 16 bits, already has the layout of the second product's A operand.
//
// Forward is FlashAttention's recurrence.  Backward, as on the CUDA cores, sweeps twice, over
// keys for dq and over queries for dk and dv, and every sum has one owner: no atomics.  The
// log-sum-exp is read back; δ = out · dout comes from a small kernel that runs first.
#pragma once
#include "tensor_tile.cuh"

namespace equimini {
namespace tensor_cores {

template <class T, int K>
__global__ void __launch_bounds__(kThreads, K <= 5 ? 4 : 3) forward_kernel(Attention p) {
  constexpr int kPart = 16 * Tile<T, K>::kStride;  // 16 rows
  const Tile<T, K> tile(p, int(p.offset()));
  uint32_t q[K][4], dropout_rows[2];
  float out[2 * K][4] = {}, m[2] = {kNothing, kNothing}, l[2] = {};
  tile.own(q, tile.rows_of(p.q, tile.offset), true);
  const Rows<T> keys = tile.rows_of(p.k, 0), values = tile.rows_of(p.v, 0);
#pragma unroll
  for (int r = 0; r < 2; r++) dropout_rows[r] = tile.dropout_row_at(tile.mine(2 * r));
  const float scale = float(p.scale) * kLog2e;

  const int end = std::min(tile.start + kTile, tile.n_k);
  const int begin = std::max(0, tile.start - tile.window + 1);
  constexpr bool kAhead = K <= 4;  // registers hold the next rows while these are used
  Eight<T> next_k[Tile<T, K>::kAtOnce], next_v[Tile<T, K>::kAtOnce];
  const auto fetch = [&](int at) {
    tile.fetch(next_k, keys, at, 0), tile.fetch(next_v, values, at, 0);
  };
  if constexpr (kAhead) fetch(begin);
  for (int block = begin; block < end; block += kStream) {
    if constexpr (kAhead) {
      __syncthreads();  // the rows before are used up
      tile.put(tile.x, next_k, block, 0, true);
      tile.put(tile.y, next_v, block, 0, false);
      __syncthreads();
      fetch(block + kStream);
    } else {
      tile.stage(keys, block, true, values, block, false, [] {});
    }
    float s[2][2][4] = {}, highest[2] = {m[0], m[1]};
    bool met[2];
#pragma unroll
    for (int part = 0; part < 2; part++) {  // 16 keys each
      const int at = block + part * 16;
      met[part] = at <= tile.first + 15 && at + 15 > tile.first - tile.window;
      if (met[part]) tile.scores(s[part], q, tile.x + part * kPart);
      const bool whole = at + 15 <= tile.first && at + tile.window > tile.first + 15;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[part][n][i] *= scale;
      if (!whole)  // not every query sees every key: `behind` is huge for later ones
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const unsigned behind = tile.mine(i) - tile.theirs(at, n, i);
            if (behind >= unsigned(tile.window)) s[part][n][i] = -INFINITY;
          }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) highest[i / 2] = fmaxf(highest[i / 2], s[part][n][i]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {  // a row's scores lie in four lanes
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kWarp, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kWarp, highest[r], 2));
      const float shrink = exp2_of(m[r] - highest[r]);
      m[r] = highest[r];
      l[r] *= shrink;
#pragma unroll
      for (int n = 0; n < 2 * K; n++) out[n][2 * r] *= shrink, out[n][2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (!met[part]) continue;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float weight = exp2_of(s[part][n][i] - m[i / 2]);
          const int key = tile.theirs(block + part * 16, n, i);
          l[i / 2] += weight;
          s[part][n][i] = weight * tile.dropout.keep(dropout_rows[i / 2], key);
        }
      tile.accumulate(out, s[part], tile.y + part * kPart);
    }
  }

  float by[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    l[r] += __shfl_xor_sync(kWarp, l[r], 1);
    l[r] += __shfl_xor_sync(kWarp, l[r], 2);
    by[r] = 1 / l[r];
    const int position = tile.mine(2 * r);
    if (tile.lane % 4 == 0 && position < tile.n_k)
      static_cast<float*>(p.lse)[tile.statistics_at(position)] = (m[r] + log2f(l[r])) * kLn2;
  }
  tile.write(p.out, tile.offset, out, by, false);
}

// delta (B, H, Nq) = out · dout, 16 lanes to a row.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(Attention p, float* delta) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 16;
  const int slot = threadIdx.x % 16;
  const int64_t h = row % p.h, i = row / p.h % p.n_q, b = row / p.h / p.n_q;
  float sum = 0;
  if (b < p.b && slot * 8 < p.d) {
    float x[8], y[8];
    unpack(x, load_eight(static_cast<const T*>(p.out) + row * p.d + slot * 8));
    unpack(y, load_eight(p.grad.row<T>(b, i, h) + slot * 8));
    sum = dot(x, y);
  }
  sum = over_group<16>(sum);
  if (b < p.b && slot == 0) delta[(b * p.h + h) * p.n_q + i] = sum;
}

// One sweep of the backward pass; see shared_memory.cuh, where it is the same:
//   over keys:    a, b = q, dout    x, y = k, v       gain_a = dq
//   over queries: a, b = k, v       x, y = q, dout    gain_a = dk, gain_b = dv
template <bool OverQueries, class T, int K>
__device__ void sweep(const Tile<T, K>& tile, const float* delta, const uint32_t (&a)[K][4],
                      const uint32_t (&b)[K][4], float (&gain_a)[2 * K][4],
                      float (&gain_b)[2 * K][4]) {
  const Attention& p = tile.p;
  const float* lse = static_cast<const float*>(p.lse);
  float own_lse[2] = {}, own_delta[2] = {};
  uint32_t own_dropout[2] = {};
#pragma unroll
  for (int r = 0; r < 2 && !OverQueries; r++) {
    const int position = tile.mine(2 * r);
    if (position < tile.offset || position >= tile.n_k) continue;
    own_lse[r] = lse[tile.statistics_at(position)] * kLog2e;
    own_delta[r] = delta[tile.statistics_at(position)];
    own_dropout[r] = tile.dropout_row_at(position);
  }
  const float scale = float(p.scale) * kLog2e;
  const int tile_end = std::min(tile.start + kTile, tile.n_k);
  const int begin = OverQueries ? std::max(tile.start, tile.offset)
                                    : std::max(0, tile.start - tile.window + 1);
  const int end = OverQueries ? std::min(tile_end + tile.window - 1, tile.n_k) : tile_end;
  for (int block = begin; block < end; block += kStream) {
    const Rows<T> xs = OverQueries ? tile.rows_of(p.q, tile.offset) : tile.rows_of(p.k, 0);
    const Rows<T> ys = OverQueries ? tile.rows_of(p.grad, tile.offset) : tile.rows_of(p.v, 0);
    const int streamed = block + int(threadIdx.x);  // the row whose statistics I bring
    const bool brings = OverQueries && threadIdx.x < kStream && streamed < tile.n_k;
    const int64_t at = tile.statistics_at(streamed);
    const float log_sum = brings ? lse[at] * kLog2e : INFINITY;  // no such query: weight 0
    const float delta_of = brings ? delta[at] : 0.0f;
    tile.stage(xs, block, true, ys, block, false, [&] {
      if (!OverQueries || threadIdx.x >= kStream) return;
      tile.lse[threadIdx.x] = log_sum, tile.delta[threadIdx.x] = delta_of;
      tile.dropout_rows[threadIdx.x] = tile.dropout_row_at(streamed);
    });
    for (int part = 0; part < kStream; part += 16) {
      const int at = block + part;
      const bool met = OverQueries ? at + 15 >= tile.first && at < tile.first + 15 + tile.window
                                   : at <= tile.first + 15 && at + 15 > tile.first - tile.window;
      if (!met) continue;
      float s[2][4], ds[2][4];
      tile.scores(s, a, tile.x + part * Tile<T, K>::kStride);
      tile.scores(ds, b, tile.y + part * Tile<T, K>::kStride);
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int mine = tile.mine(i), theirs = tile.theirs(at, n, i);
          const int query = OverQueries ? theirs : mine, key = OverQueries ? mine : theirs;
          const bool seen = unsigned(query - key) < unsigned(tile.window);
          const float log_sum = OverQueries ? tile.lse[theirs - block] : own_lse[i / 2];
          const float delta_i = OverQueries ? tile.delta[theirs - block] : own_delta[i / 2];
          const uint32_t row = OverQueries ? tile.dropout_rows[query - block] : own_dropout[i / 2];
          const float weight = seen ? exp2_of(s[n][i] * scale - log_sum) : 0.0f;
          const float keep = tile.dropout.keep(row, key);
          s[n][i] = weight * keep;
          ds[n][i] = weight * (ds[n][i] * keep - delta_i);
        }
      tile.accumulate(gain_a, ds, tile.x + part * Tile<T, K>::kStride);
      if constexpr (OverQueries)
        tile.accumulate(gain_b, s, tile.y + part * Tile<T, K>::kStride);
    }
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads, K == 4 ? 3 : 0)
    backward_kernel(Attention p, const float* delta) {
  const Tile<T, K> tile(p, 0);
  uint32_t a[K][4], b[K][4];
  float gain_a[2 * K][4] = {}, gain_b[2 * K][4];
  const float scale[2] = {float(p.scale), float(p.scale)}, one[2] = {1, 1};
  if (tile.start + kTile > tile.offset) {  // the tile holds queries
    tile.own(a, tile.rows_of(p.q, tile.offset), true);
    tile.own(b, tile.rows_of(p.grad, tile.offset), false);
    sweep<false>(tile, delta, a, b, gain_a, gain_b);
    tile.write(p.dq, tile.offset, gain_a, scale, true);
  }
  tile.own(a, tile.rows_of(p.k, 0), true);
  tile.own(b, tile.rows_of(p.v, 0), false);
#pragma unroll
  for (int n = 0; n < 2 * K; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) gain_a[n][i] = gain_b[n][i] = 0;
  sweep<true>(tile, delta, a, b, gain_a, gain_b);
  tile.write(p.dk, 0, gain_a, scale, true);
  tile.write(p.dv, 0, gain_b, one, false);
}

template <class T, int K>
int run(bool backward, const Attention& p, void* stream, float* delta) {
  const int64_t tiles = ((backward ? p.n_k : p.n_q) + kTile - 1) / kTile;
  const int64_t blocks = p.b * p.h * tiles;
  if (blocks > INT32_MAX) return kTooLarge;
  if (!backward)
    return launch(forward_kernel<T, K>, blocks, kThreads, Tile<T, K>::kShared, stream, p);
  const int64_t delta_blocks = (p.b * p.h * p.n_q * 16 + kThreads - 1) / kThreads;
  if (delta_blocks > INT32_MAX) return kTooLarge;
  const int error = launch(delta_kernel<T>, delta_blocks, kThreads, 0, stream, p, delta);
  return error ? error : launch(backward_kernel<T, K>, blocks, kThreads, Tile<T, K>::kShared,
                                stream, p, static_cast<const float*>(delta));
}

template <class T>
int run(bool backward, const Attention& p, void* stream, float* delta) {
  return p.d <= 64   ? run<T, 4>(backward, p, stream, delta)
         : p.d <= 80 ? run<T, 5>(backward, p, stream, delta)
                     : run<T, 8>(backward, p, stream, delta);
}

}  // namespace tensor_cores
}  // namespace equimini
