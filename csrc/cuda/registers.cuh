// Windowed attention on CUDA cores for windows of up to 4, the model's: any dtype.
//
// At the model's shape (N = 16, W = 4, D = 64) the work is bytes: in bf16 a token-head costs
// 4·D·2 + 4 of them forward (q, k, v, out and the log-sum-exp) and 7·D·2 backward (q, k, v, dout,
// dq, dk, dv), and arithmetic a fraction of that time.  So every row is read once, in 16-byte
// pieces, ahead of its use, and nothing is stored that need not be:
//
// * A group of G = 8 lanes (16 for D > 64) walks along the tokens of one head, 8 channels =
//   16 bytes of bf16 to a lane.  A warp is four groups side by side, on neighbouring heads, which
//   are neighbours in memory: it reads 512 consecutive bytes at a time.  N is not padded.
//   (FlashAttention-2 computes tiles of 128×128 scores, of which 58 are wanted here.)
// * The last W keys and values are a ring in registers, rotated and as floats.  The loop over
//   tokens is unrolled W times, so that a slot of the ring has a fixed place.  There is no
//   shared memory, and a block is one warp.
// * Rows are asked for kAhead tokens before they are needed.  To have that many loads under way
//   matters more than how many warps there are, which registers limit.  Loads have no condition:
//   beside the sequence the nearest row is read, and its weight is 0.
// * A score is summed over the group's lanes by shuffles, and every lane then has the whole row
//   of W scores: the softmax needs no running maximum.
//
// Backward computes the softmax anew, and with all W weights of a row it knows
// δ = Σ_j P_j dP_j = out · dout, too: neither the output nor the log-sum-exp is read.  dk and dv
// lie in the ring beside their key and are written, once, when the key leaves it.
//
// Long sequences are cut into stretches of about kStretch tokens, a group for each; where there
// would be few groups, into shorter ones, down to kRing (9.8 to 7.0 µs forward for 64 sequences of
// 16 tokens and 8 heads on an H200).  A group owns the results of its stretch: it looks W − 1 tokens
// back for keys and, backward, walks W − 1 tokens on for the queries that still see its keys, rows
// that it shares with its neighbours.  So all sums have one owner and one order: no atomics.
#pragma once
#include "rows.cuh"

namespace equimini {
namespace registers {

constexpr int kRing = kRegisterWindow;
constexpr int kStretch = 64;
#ifndef EQUIMINI_FEW_GROUPS  // a test sets it to 0, for the long stretches of many groups
#define EQUIMINI_FEW_GROUPS 4096  // fewer leave a GPU idle: 8 warps to each of 128 multiprocessors
#endif
constexpr int kFewGroups = EQUIMINI_FEW_GROUPS;

// A group's walk: who I am, which positions I own, and where the walk begins and ends.
template <class T, int G>
struct Walk {
  const Attention& p;
  const int n_k, window, offset;  // p's, in the 32 bits that they fit
  int b, h, slot;
  int start, end;    // positions that I own
  int first, last;   // positions that I walk over; a multiple of kRing, the same in every group
  bool active;       // my slot holds channels (D may be less than 8·G)
  const Dropout dropout;
  uint32_t dropout_head;

  __device__ Walk(const Attention& p, int low, int stretch, bool backward)
      : p(p), n_k(int(p.n_k)), window(int(p.window)), offset(int(p.offset())), dropout(p) {
    const int lane = threadIdx.x, heads = int(p.h);
    const int stretches = (n_k - low + stretch - 1) / stretch;
    const int item = int(blockIdx.x) * (32 / G) + lane / G, line = item / heads;
    const bool exists = line < int(p.b) * stretches;  // else I walk along, and own nothing
    b = exists ? line / stretches : 0, h = item % heads, slot = lane % G;
    active = slot * 8 < p.d, dropout_head = dropout.head(p, b, h);
    start = low + line % stretches * stretch;
    end = exists ? std::min(start + stretch, n_k) : start;
    const int lead = stretches > 1 ? window - 1 : std::min(window - 1, low);
    const int trail = backward && stretches > 1 ? window - 1 : 0;
    first = start - lead;
    last = first + (lead + stretch + trail + kRing - 1) / kRing * kRing;
  }

  __device__ bool owned(int position) const { return position >= start && position < end; }
  __device__ Rows<T> queries(const Heads& x) const {
    return {x, b, h, active ? slot * 8 : 0, offset, n_k - offset};
  }
  __device__ Rows<T> keys(const Heads& x) const {
    return {x, b, h, active ? slot * 8 : 0, 0, n_k};
  }

  // The angles of a position, or of the nearest there is; only where there are tables.
  __device__ Turn turn(int position) const {
    return Turn(p, std::max(0, std::min(position, n_k - 1)), active ? slot : 0);
  }
  // s[behind] = x · rows[slot of the key so far behind], for x at a position in slot u.
  __device__ void products(float (&s)[kRing], const float (&x)[8], const float (&rows)[kRing][8],
                           int u) const {
#pragma unroll
    for (int behind = 0; behind < kRing; behind++) {
      const float mine = dot(x, rows[(u - behind) & (kRing - 1)]);
      s[behind] = over_group<G>(active ? mine : 0.0f);
    }
  }
  // Scores to 2^(s − m), m the largest of them, 0 for keys that the query at a position does
  // not see.  Returns the sum.
  __device__ float exponentials(float (&s)[kRing], float& m, int position) const {
    float sum = 0;
    m = kNothing;
#pragma unroll
    for (int behind = 0; behind < kRing; behind++) {
      if (behind >= window || behind > position) s[behind] = -INFINITY;
      m = fmaxf(m, s[behind]);
    }
#pragma unroll
    for (int behind = 0; behind < kRing; behind++) sum += s[behind] = exp2_of(s[behind] - m);
    return sum;
  }
  // My 8 channels of the row at a position of a contiguous (B, length, H, D) result.
  __device__ void write(void* to, int position, int offset, const float (&x)[8]) const {
    if (active && owned(position))
      store_eight(static_cast<T*>(to) + slot * 8 +
                      p.contiguous_row(b, position - offset, h, n_k - offset), x);
  }
};

template <class T, int G>
__global__ void __launch_bounds__(32) forward_kernel(Attention p, int stretch) {
  constexpr int kAhead = sizeof(T) == 2 ? 4 : 2;  // 48 registers of rows on their way
  const Walk<T, G> walk(p, int(p.offset()), stretch, false);
  const Rows<T> qs = walk.queries(p.q), ks = walk.keys(p.k), vs = walk.keys(p.v);
  float k[kRing][8] = {}, v[kRing][8] = {};
  Eight<T> next[kAhead][3];
  const auto fetch = [&](Eight<T>(&row)[3], int position) {
    row[0] = qs.at(position), row[1] = ks.at(position), row[2] = vs.at(position);
  };
#pragma unroll
  for (int a = 0; a < kAhead; a++) fetch(next[a], walk.first + a);

  for (int from = walk.first; from < walk.last; from += kRing) {
    float my_m = 0, my_l = 1;  // of the row at from + slot
#pragma unroll
    for (int u = 0; u < kRing; u++) {
      const int position = from + u;
      float q[8], s[kRing], m, out[8] = {};
      unpack(q, next[u % kAhead][0]);
      unpack(k[u], next[u % kAhead][1]);
      unpack(v[u], next[u % kAhead][2]);
      __syncwarp();  // all loads share one counter: to unpack behind new ones waits for them, too
      fetch(next[u % kAhead], position + kAhead);
      if (p.cos) {
        const Turn turn = walk.turn(position);
        turn.rotate(q);
        turn.rotate(k[u]);
      }
      scale_by(q, float(p.scale) * kLog2e);

      walk.products(s, q, k, u);
      const float l = walk.exponentials(s, m, position), by = 1 / l;
      const uint32_t dropout_row = walk.dropout.row(walk.dropout_head, position);
#pragma unroll
      for (int behind = 0; behind < kRing; behind++)
        add(out, s[behind] * by * walk.dropout.keep(dropout_row, position - behind),
            v[(u - behind) & (kRing - 1)]);
      walk.write(p.out, position, walk.offset, out);
      if (walk.slot == u) my_m = m, my_l = l;
    }
    if (walk.slot < kRing && walk.owned(from + walk.slot))  // four log-sum-exps, a lane for each
      static_cast<float*>(p.lse)[(walk.b * p.h + walk.h) * p.n_q + from + walk.slot -
                                 walk.offset] = (my_m + log2f(my_l)) * kLn2;
  }
}

template <class T, int G>
__global__ void __launch_bounds__(32) backward_kernel(Attention p, int stretch) {
  constexpr bool kEarly = sizeof(T) == 2;  // float32 has no registers left while it computes
  constexpr int kAhead = kEarly ? 2 : 1;   // 32 registers of rows on their way
  const Walk<T, G> walk(p, 0, stretch, true);
  const Rows<T> qs = walk.queries(p.q), grads = walk.queries(p.grad);
  const Rows<T> ks = walk.keys(p.k), vs = walk.keys(p.v);
  float k[kRing][8] = {}, v[kRing][8] = {}, dk[kRing][8] = {}, dv[kRing][8] = {};
  Eight<T> next[kAhead][4];
  const auto fetch = [&](Eight<T>(&row)[4], int position) {
    row[0] = qs.at(position), row[1] = grads.at(position);
    row[2] = ks.at(position), row[3] = vs.at(position);
  };
  const auto retire = [&](int u, int position) {  // slot u's key has met all of its queries
    scale_by(dk[u], kLn2);                        // q came times scale · log₂ e
    if (p.cos) walk.turn(position).rotate(dk[u], -1);
    walk.write(p.dk, position, 0, dk[u]);
    walk.write(p.dv, position, 0, dv[u]);
#pragma unroll
    for (int c = 0; c < 8; c++) dk[u][c] = dv[u][c] = 0;
  };
#pragma unroll
  for (int a = 0; a < kAhead; a++) fetch(next[a], walk.first + a);

  for (int from = walk.first; from < walk.last; from += kRing) {
#pragma unroll
    for (int u = 0; u < kRing; u++) {
      const int position = from + u;
      retire(u, position - kRing);
      float q[8], dout[8], p_row[kRing], dp[kRing], m, dq[8] = {}, delta = 0;
      unpack(q, next[u % kAhead][0]);
      unpack(dout, next[u % kAhead][1]);
      unpack(k[u], next[u % kAhead][2]);
      unpack(v[u], next[u % kAhead][3]);
      __syncwarp();  // as in the forward pass
      if (kEarly) fetch(next[u % kAhead], position + kAhead);
      if (p.cos) {
        const Turn turn = walk.turn(position);
        turn.rotate(q);
        turn.rotate(k[u]);
      }
      scale_by(q, float(p.scale) * kLog2e);

      walk.products(p_row, q, k, u);
      walk.products(dp, dout, v, u);
      const float by = 1 / walk.exponentials(p_row, m, position);
      const bool is_query = position >= walk.offset && position < walk.n_k;
      const uint32_t dropout_row = walk.dropout.row(walk.dropout_head, position);
      float keep[kRing];
#pragma unroll
      for (int behind = 0; behind < kRing; behind++) {
        keep[behind] = walk.dropout.keep(dropout_row, position - behind);
        p_row[behind] = is_query ? p_row[behind] * by : 0.0f;
        dp[behind] *= keep[behind];
        delta += p_row[behind] * dp[behind];
      }
#pragma unroll
      for (int behind = 0; behind < kRing; behind++) {
        const int slot = (u - behind) & (kRing - 1);
        const float ds = p_row[behind] * (dp[behind] - delta);
        add(dq, ds, k[slot]);
        add(dk[slot], ds, q);
        add(dv[slot], p_row[behind] * keep[behind], dout);
      }
      scale_by(dq, float(p.scale));
      if (p.cos) walk.turn(position).rotate(dq, -1);
      if (position >= walk.offset) walk.write(p.dq, position, walk.offset, dq);
      if (!kEarly) fetch(next[0], position + 1);
    }
  }
#pragma unroll
  for (int u = 0; u < kRing; u++) retire(u, walk.last - kRing + u);
}

template <class T, int G>
int run(bool backward, const Attention& p, void* stream) {
  const int64_t length = backward ? p.n_k : p.n_q, stretches = (length + kStretch - 1) / kStretch;
  int64_t stretch = (length + stretches - 1) / stretches;
  while (stretch > kRing && p.b * p.h * ((length + stretch - 1) / stretch) < kFewGroups)
    stretch = (stretch + 1) / 2;
  const int64_t groups = p.b * p.h * ((length + stretch - 1) / stretch);
  if (groups > INT32_MAX - 32) return kTooLarge;
  return launch(backward ? backward_kernel<T, G> : forward_kernel<T, G>,
                (groups + 32 / G - 1) / (32 / G), 32, 0, stream, p, int(stretch));
}

template <class T>
int run(bool backward, const Attention& p, void* stream) {
  return p.d <= 64 ? run<T, 8>(backward, p, stream) : run<T, 16>(backward, p, stream);
}

}  // namespace registers
}  // namespace equimini
