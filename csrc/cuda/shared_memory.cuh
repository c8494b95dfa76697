// Windowed attention on CUDA cores: any dtype, any window.  Of use between the windows that fit
// into registers (registers.cuh) and those that are worth a tensor core (tensor_cores.cuh), and
// for float32, which tensor cores would round.
//
// Rows are read in 16-byte pieces, with many loads in flight:
//
// * A warp owns a tile of one sequence (one batch entry and head) and needs no other warp: it
//   synchronises with itself alone, and a block is just several sequences side by side, heads
//   fastest, since heads of one token are neighbours in memory.
// * Eight lanes (a *group*; 16 lanes for D > 64) read a row, 8 channels = 16 bytes of bf16 each.
//   Four groups with 4 query rows each make a tile of 16 queries: N = 16 is not padded at all.
// * Keys and values of the tile, and the W − 1 before it, go through shared memory as floats,
//   rotated on the way.  A lane reads back the 8 channels of its own slot, as two float4 that
//   lie so that a group reads 128 consecutive bytes: no bank conflict.
// * A group meets only the W + 3 keys that its 4 queries see; a key is read from shared memory
//   once for the 4 of them.  Scores are summed over the group's lanes by shuffles, and every
//   lane of the group then holds the same softmax.
// * Windows too long for the buffer (kBufferRows) are met in blocks, with a running maximum, as
//   in FlashAttention.  The range of a group differs from its neighbours', the number of steps
//   does not, so shuffles are always reached by the whole warp.
//
// Backward, a warp owns the dq, dk and dv of its tile of positions: one sweep over the keys that
// its queries see makes dq, a second one over the queries that see its keys makes dk and dv.
// Both compute the same scores again, which costs arithmetic that memory hides, and needs no
// atomics: every sum has one owner and one order.  The second sweep's rows are the first one's
// again (and the W − 1 after them), so they come from the L1 and L2 caches.
#pragma once
#include "rows.cuh"

namespace equimini {
namespace shared_memory {

constexpr int kWarps = 4;  // in a block
constexpr int kQuad = 4;   // rows that a group owns

template <int G>  // lanes in a group
constexpr int kTile = kQuad * 32 / G;
template <int G>  // rows of shared memory for a warp, each for two tensors
constexpr int kBufferRows = 256 / G;

// Rows of the buffer that this window needs, and bytes of shared memory for a block.
template <int G>
int buffer_rows(const Attention& p) {
  return int(std::min<int64_t>(kBufferRows<G>, kTile<G> + std::min(p.window, p.n_k) - 1));
}
template <int G>
size_t shared_bytes(int rows) {
  return size_t(kWarps) * rows * (2 * G * 8 + 2) * sizeof(float);
}

// A warp's tile: who I am, which rows are mine, and my part of shared memory.
template <class T, int G>
struct Tile {
  const Attention& p;
  const int n_k, window, offset;  // p's, in the 32 bits that they fit
  int group, slot, rows;
  int b, h, start, mine;      // start, mine: positions of the tile's and of my first row
  bool exists, active;        // active: my slot holds channels (D may be less than 8·G)
  float4 *x, *y;              // the buffer: rows × [half][slot]
  float *lse, *delta;         // of buffered queries
  const Dropout dropout;
  uint32_t dropout_head;

  __device__ Tile(const Attention& p, int rows, int first)
      : p(p), n_k(int(p.n_k)), window(int(p.window)), offset(int(p.offset())), rows(rows),
        dropout(p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    group = lane / G, slot = lane % G;
    const int tiles = (n_k - first + kTile<G> - 1) / kTile<G>;
    const int item = int(blockIdx.x) * kWarps + warp, heads = int(p.h), line = item / heads;
    h = item % heads, b = line / tiles, start = first + line % tiles * kTile<G>;
    mine = start + group * kQuad;
    exists = b < p.b, active = slot * 8 < p.d;
    dropout_head = dropout.head(p, b, h);
    x = static_cast<float4*>(block_memory()) + size_t(warp) * rows * 4 * G;
    y = x + rows * 2 * G;
    lse = reinterpret_cast<float*>(static_cast<float4*>(block_memory()) +
                                   size_t(kWarps) * rows * 4 * G) + warp * rows * 2;
    delta = lse + rows;
  }

  // My 8 channels of the row at a position, or zeros where there is none.
  __device__ Eight<T> fetch(const Heads& from, int position, int offset, int end) const {
    if (!active || position < offset || position >= end) return Eight<T>{};
    return load_eight(from.row<T>(b, position - offset, h) + slot * 8);
  }

  // My four rows of `from`, whose first row stands at position `offset`.
  __device__ void own(float (&to)[kQuad][8], const Heads& from, int offset, bool rotated,
                      float by) const {
    Eight<T> raw[kQuad];
#pragma unroll
    for (int r = 0; r < kQuad; r++) raw[r] = fetch(from, mine + r, offset, n_k);
#pragma unroll
    for (int r = 0; r < kQuad; r++)
      widen(to[r], raw[r], p, std::min(mine + r, n_k - 1), active ? slot : 0, rotated, by);
  }

  __device__ void put(float4* to, int row, const float (&v)[8]) const {
    to[row * 2 * G + slot] = make_float4(v[0], v[1], v[2], v[3]);
    to[row * 2 * G + G + slot] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __device__ void get(float (&v)[8], const float4* from, int row) const {
    const float4 low = from[row * 2 * G + slot], high = from[row * 2 * G + G + slot];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }

  // Fill the buffer with `count` rows from position `first` on: `turned` (rotated, times `by`)
  // into x, `plain` into y.  A lane has eight 16-byte loads in flight at once.
  __device__ void fill(const Heads& turned, const Heads& plain, int offset, float by, int first,
                       int count) const {
    constexpr int kGroups = 32 / G, kAtOnce = 8 / sizeof(T);  // 32 registers of loads in flight
    __syncwarp();  // nobody reads the old rows any more
    for (int row = group; row < count; row += kAtOnce * kGroups) {
      Eight<T> raw[2][kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        const int end = first + count;
        raw[0][r] = fetch(turned, first + row + r * kGroups, offset, end);
        raw[1][r] = fetch(plain, first + row + r * kGroups, offset, end);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        const int to = row + r * kGroups;
        if (to >= count) break;
        float v[8];
        widen(v, raw[0][r], p, first + to, active ? slot : 0, true, by);
        put(x, to, v);
        widen(v, raw[1][r], p, first + to, active ? slot : 0, false, 1.0f);
        put(y, to, v);
      }
    }
    __syncwarp();  // all rows are there
  }

  // Log-sum-exp (base 2) and δ = out · dout of the buffered queries, which y holds dout of.
  __device__ void fill_statistics(int first, int count) const {
    const Heads out{p.out, p.n_q * p.h * p.d, p.h * p.d, p.d};
    for (int at = 0; at < count; at += 32 / G) {
      const int row = std::min(at + group, count - 1);
      float dout[8];
      get(dout, y, row);
      float value[8];
      unpack(value, fetch(out, first + row, offset, n_k));
      const float sum = over_group<G>(dot(dout, value));
      if (slot == 0 && at + group < count) {
        delta[row] = sum;
        lse[row] = log_sum(first + row);
      }
    }
    __syncwarp();
  }

  __device__ float* log_sum_at(int position) const {
    return static_cast<float*>(p.lse) + (b * p.h + h) * p.n_q + position - offset;
  }
  __device__ float log_sum(int position) const { return *log_sum_at(position) * kLog2e; }
  __device__ uint32_t dropout_row_at(int position) const {
    return dropout.row(dropout_head, position);
  }

  // My slot of row `position` of a contiguous (B, length, H, D) result.
  __device__ void write(void* to, int position, int offset, const float (&v)[8]) const {
    if (active)
      store_eight(static_cast<T*>(to) +
                      p.contiguous_row(b, position - offset, h, n_k - offset) + slot * 8, v);
  }
};

template <class T, int G>
__global__ void __launch_bounds__(32 * kWarps, 3) forward_kernel(Attention p, int rows) {
  const Tile<T, G> tile(p, rows, int(p.offset()));
  if (!tile.exists) return;
  float q[kQuad][8], sum[kQuad][8] = {}, m[kQuad], l[kQuad];
  uint32_t dropout_rows[kQuad];
  tile.own(q, p.q, tile.offset, true, float(p.scale) * kLog2e);
#pragma unroll
  for (int r = 0; r < kQuad; r++) {
    m[r] = kNothing, l[r] = 0;
    dropout_rows[r] = tile.dropout_row_at(tile.mine + r);
  }

  const int end = std::min(tile.start + kTile<G>, tile.n_k);
  const int begin = std::max(0, tile.start - tile.window + 1);
  for (int block = begin; block < end; block += rows) {
    const int count = std::min(rows, end - block);
    tile.fill(p.k, p.v, 0, 1.0f, block, count);
    const int low = std::max(block, tile.mine - tile.window + 1);
    const int steps = std::min(tile.window + kQuad - 1, count);
    for (int step = 0; step < steps; step += kQuad) {  // four keys at a time
      float s[kQuad][kQuad];
#pragma unroll
      for (int c = 0; c < kQuad; c++) {
        const int key = low + step + c;
        float k[8];
        tile.get(k, tile.x, std::min(key - block, count - 1));
#pragma unroll
        for (int r = 0; r < kQuad; r++) {
          s[r][c] = over_group<G>(dot(q[r], k));
          const unsigned behind = tile.mine + r - key;  // huge for later keys
          if (behind >= unsigned(tile.window) || key >= block + count) s[r][c] = -INFINITY;
        }
      }
#pragma unroll
      for (int r = 0; r < kQuad; r++) {
        float highest = m[r];
#pragma unroll
        for (int c = 0; c < kQuad; c++) highest = fmaxf(highest, s[r][c]);
        const float shrink = exp2_of(m[r] - highest);
        m[r] = highest;
        l[r] *= shrink;
        scale_by(sum[r], shrink);
#pragma unroll
        for (int c = 0; c < kQuad; c++) {
          s[r][c] = exp2_of(s[r][c] - highest);
          l[r] += s[r][c];
          s[r][c] *= tile.dropout.keep(dropout_rows[r], low + step + c);
        }
      }
#pragma unroll
      for (int c = 0; c < kQuad; c++) {
        float v[8];
        tile.get(v, tile.y, std::min(low + step + c - block, count - 1));
#pragma unroll
        for (int r = 0; r < kQuad; r++) add(sum[r], s[r][c], v);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kQuad; r++) {
    const int position = tile.mine + r;
    if (position >= tile.n_k) break;
    scale_by(sum[r], 1 / l[r]);
    tile.write(p.out, position, tile.offset, sum[r]);
    if (tile.slot == 0) *tile.log_sum_at(position) = (m[r] + log2f(l[r])) * kLn2;
  }
}

// One sweep of the backward pass.  My four rows (a, b) meet streamed rows (x, y):
//   over keys:    a, b = q, dout    x, y = k, v       gain_a = dq
//   over queries: a, b = k, v       x, y = q, dout    gain_a = dk, gain_b = dv
// with s = a·x, dp = b·y, ds = P ∘ (dp − δ), gain_a += ds x, gain_b += P y.
template <bool OverQueries, class T, int G>
__device__ void sweep(const Tile<T, G>& tile, const float (&a)[kQuad][8],
                      const float (&b)[kQuad][8], const float (&lse)[kQuad],
                      const float (&delta)[kQuad], float (&gain_a)[kQuad][8],
                      float (&gain_b)[kQuad][8]) {
  const Attention& p = tile.p;
  uint32_t dropout_rows[kQuad];
#pragma unroll
  for (int r = 0; r < kQuad; r++)
    dropout_rows[r] = OverQueries ? 0 : tile.dropout_row_at(tile.mine + r);
  const int tile_end = std::min(tile.start + kTile<G>, tile.n_k);
  const int begin = OverQueries ? std::max(tile.start, tile.offset)
                                    : std::max(0, tile.start - tile.window + 1);
  const int end = OverQueries ? std::min(tile_end + tile.window - 1, tile.n_k) : tile_end;
  for (int block = begin; block < end; block += tile.rows) {
    const int count = std::min(tile.rows, end - block);
    if (OverQueries) {
      tile.fill(p.q, p.grad, tile.offset, float(p.scale) * kLog2e, block, count);
      tile.fill_statistics(block, count);
    } else {
      tile.fill(p.k, p.v, 0, 1.0f, block, count);
    }
    const int low = std::max(block, OverQueries ? tile.mine : tile.mine - tile.window + 1);
    const int steps = std::min(tile.window + kQuad - 1, count);
    for (int step = 0; step < steps; step++) {
      const int other = low + step;
      const int row = std::min(other - block, count - 1);
      const uint32_t dropout_other = OverQueries ? tile.dropout_row_at(other) : 0;
      float x[8], y[8];
      tile.get(x, tile.x, row);
      tile.get(y, tile.y, row);
#pragma unroll
      for (int r = 0; r < kQuad; r++) {
        const float s = over_group<G>(dot(a[r], x)), dp = over_group<G>(dot(b[r], y));
        const int query = OverQueries ? other : tile.mine + r;
        const int key = OverQueries ? tile.mine + r : other;
        const bool seen = unsigned(query - key) < unsigned(tile.window) && other < block + count;
        const float weight = seen ? exp2_of(s - (OverQueries ? tile.lse[row] : lse[r])) : 0.0f;
        const float keep = tile.dropout.keep(OverQueries ? dropout_other : dropout_rows[r], key);
        const float ds = weight * (dp * keep - (OverQueries ? tile.delta[row] : delta[r]));
        add(gain_a[r], ds, x);
        if (OverQueries) add(gain_b[r], weight * keep, y);
      }
    }
  }
}

template <class T, int G>
__global__ void __launch_bounds__(32 * kWarps, 2) backward_kernel(Attention p, int rows) {
  const Tile<T, G> tile(p, rows, 0);
  if (!tile.exists) return;
  float a[kQuad][8], b[kQuad][8], lse[kQuad] = {}, delta[kQuad] = {};
  float gain_a[kQuad][8] = {}, gain_b[kQuad][8] = {};

  if (tile.start + kTile<G> > tile.offset) {  // the tile holds queries
    const Heads out{p.out, p.n_q * p.h * p.d, p.h * p.d, p.d};
    tile.own(a, p.q, tile.offset, true, float(p.scale) * kLog2e);
    tile.own(b, p.grad, tile.offset, false, 1.0f);
#pragma unroll
    for (int r = 0; r < kQuad; r++) {
      const int position = tile.mine + r;
      float value[8];
      unpack(value, tile.fetch(out, position, tile.offset, tile.n_k));
      delta[r] = over_group<G>(dot(b[r], value));
      if (position >= tile.offset && position < tile.n_k) lse[r] = tile.log_sum(position);
    }
    sweep<false>(tile, a, b, lse, delta, gain_a, gain_b);
#pragma unroll
    for (int r = 0; r < kQuad; r++) {
      const int position = tile.mine + r;
      if (position < tile.offset || position >= tile.n_k) continue;
      scale_by(gain_a[r], float(p.scale));
      if (p.cos && tile.active) Turn(p, position, tile.slot).rotate(gain_a[r], -1);
      tile.write(p.dq, position, tile.offset, gain_a[r]);
    }
  }

  tile.own(a, p.k, 0, true, 1.0f);
  tile.own(b, p.v, 0, false, 1.0f);
#pragma unroll
  for (int r = 0; r < kQuad; r++)
#pragma unroll
    for (int i = 0; i < 8; i++) gain_a[r][i] = 0;
  sweep<true>(tile, a, b, lse, delta, gain_a, gain_b);
#pragma unroll
  for (int r = 0; r < kQuad; r++) {
    const int position = tile.mine + r;
    if (position >= tile.n_k) break;
    scale_by(gain_a[r], kLn2);  // q came times scale · log₂ e
    if (p.cos && tile.active) Turn(p, position, tile.slot).rotate(gain_a[r], -1);
    tile.write(p.dk, position, 0, gain_a[r]);
    tile.write(p.dv, position, 0, gain_b[r]);
  }
}

template <class T, int G>
int run(bool backward, const Attention& p, void* stream) {
  const int64_t tiles = ((backward ? p.n_k : p.n_q) + kTile<G> - 1) / kTile<G>;
  const int64_t blocks = (p.b * p.h * tiles + kWarps - 1) / kWarps;
  if (blocks * kWarps > INT32_MAX) return kTooLarge;
  const int rows = buffer_rows<G>(p);
  return launch(backward ? backward_kernel<T, G> : forward_kernel<T, G>, blocks, 32 * kWarps,
                shared_bytes<G>(rows), stream, p, rows);
}

template <class T>
int run(bool backward, const Attention& p, void* stream) {
  return p.d <= 64 ? run<T, 8>(backward, p, stream) : run<T, 16>(backward, p, stream);
}

}  // namespace shared_memory
}  // namespace equimini
