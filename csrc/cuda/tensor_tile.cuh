// The tile of a block on tensor cores: its rows, staged through shared memory, and the products.
#pragma once
#include "rows.cuh"

namespace equimini {
namespace tensor_cores {

constexpr int kThreads = 128;
constexpr int kTile = 64;    // positions that a block owns, 16 for each warp
constexpr int kStream = 32;  // rows of the other side in shared memory

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  struct alignas(4) Pair { T low, high; } pair{from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<uint32_t*>(&pair);
}

// A block's tile: which rows, and the shared memory: kStream rows x and y, or kTile rows.
template <class T, int K>  // K: D in steps of 16, rounded up
struct Tile {
  static constexpr int kStride = 16 * K + 8;
  static constexpr int kRowsAtOnce = kThreads / (2 * K);  // that the block's threads read
  static constexpr int kPieces = (kStream + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kAtOnce = K < 8 ? kPieces : 1;  // at D = 128 registers are short
  static constexpr size_t kShared = kTile * kStride * sizeof(T) + 3 * kStream * sizeof(float);

  const Attention& p;
  const int n_k, window, offset;  // p's, in the 32 bits that they fit
  unsigned b, h;                  // unsigned: what widens them to 64 bits costs no register
  int lane, start, first;         // start, first: positions of the block's and the warp's rows
  T *x, *y;
  float *lse, *delta;        // of the kStream rows, where these are queries,
  uint32_t* dropout_rows;    // and their part of the hash
  const Dropout dropout;
  uint32_t dropout_head;

  __device__ Tile(const Attention& p, int low)
      : p(p), n_k(int(p.n_k)), window(int(p.window)), offset(int(p.offset())), dropout(p) {
    const int tiles = (n_k - low + kTile - 1) / kTile;
    const int heads = int(p.h), line = int(blockIdx.x) / heads;
    h = int(blockIdx.x) % heads, b = line / tiles, start = low + line % tiles * kTile;
    lane = threadIdx.x % 32, first = start + int(threadIdx.x / 32) * 16;
    dropout_head = dropout.head(p, b, h);
    x = static_cast<T*>(block_memory()), y = x + kStream * kStride;
    lse = reinterpret_cast<float*>(x + kTile * kStride), delta = lse + kStream;
    dropout_rows = reinterpret_cast<uint32_t*>(delta + kStream);
  }

  // One tensor's rows of my head, my 8 channels of each.
  __device__ Rows<T> rows_of(const Heads& heads, int offset) const {
    return {heads, int(b), int(h), active() ? slot() * 8 : 0, offset, n_k - offset};
  }
  // In staging a thread has one slot (8 channels) of every kRowsAtOnce-th row, a piece each.
  __device__ static int slot() { return threadIdx.x % (2 * K); }
  __device__ static int row(int piece) {
    return int(threadIdx.x) / (2 * K) + piece * kRowsAtOnce;
  }
  __device__ bool active() const { return slot() * 8 < p.d; }

  // Read kAtOnce of my pieces of the kStream rows from position `at` on; beside the sequence the
  // nearest row, which gets a weight of 0.
  __device__ void fetch(Eight<T> (&raw)[kAtOnce], const Rows<T>& from, int at, int piece) const {
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) raw[n] = from.at(at + row(piece + n));
  }
  // Put them into shared memory, rotated if `turned` and there are tables; zeros beyond D.
  __device__ void put(T* to, const Eight<T> (&raw)[kAtOnce], int at, int piece,
                      bool turned) const {
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const int r = row(piece + n);
      if (r >= kStream || threadIdx.x >= kRowsAtOnce * 2 * K) break;
      T* place = to + r * kStride + slot() * 8;
      if (!active()) {
        *reinterpret_cast<uint4*>(place) = {};
      } else if (turned && p.cos) {
        float v[8];
        unpack(v, raw[n]);
        Turn(p, std::min(at + r, n_k - 1), slot()).rotate(v);
        store_eight(place, v);
      } else {
        *reinterpret_cast<uint4*>(place) = raw[n].part[0];
      }
    }
  }
  // kStream rows each to x and to y.  The first loads are under way while the block finishes
  // what it does with the rows before; `also` comes when it has.
  template <class Also>
  __device__ void stage(const Rows<T>& xs, int x_at, bool turn_x, const Rows<T>& ys, int y_at,
                        bool turn_y, Also also) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += kAtOnce) {
      Eight<T> raw_x[kAtOnce], raw_y[kAtOnce];
      fetch(raw_x, xs, x_at, piece);
      fetch(raw_y, ys, y_at, piece);
      if (piece == 0) {
        __syncthreads();
        also();
      }
      put(x, raw_x, x_at, piece, turn_x);
      put(y, raw_y, y_at, piece, turn_y);
    }
    __syncthreads();
  }

  // The warp's 16 rows of `from` as A operands.  The whole block takes part.
  __device__ void own(uint32_t (&a)[K][4], const Rows<T>& from, bool turned) const {
    stage(from, start, turned, from, start + kStream, turned, [] {});  // y lies behind x
    const T* rows = x + (first - start) * kStride;
#pragma unroll
    for (int k = 0; k < K; k++)
      load_matrices(a[k], rows + (lane / 8 % 2 * 8 + lane % 8) * kStride + (2 * k + lane / 16) * 8);
  }

  // c[n] = a · rowsᵀ for 16 rows, n: the first or the second 8.
  __device__ void scores(float (&c)[2][4], const uint32_t (&a)[K][4], const T* rows) const {
#pragma unroll
    for (int i = 0; i < 4; i++) c[0][i] = c[1][i] = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      uint32_t b[4];
      if constexpr (K < 8) {
        load_matrices(b, rows + (lane / 16 * 8 + lane % 8) * kStride + (2 * k + lane / 8 % 2) * 8);
      } else {  // the same word by word: at D = 128 it takes fewer registers
#pragma unroll
        for (int i = 0; i < 4; i++)
          b[i] = *reinterpret_cast<const uint32_t*>(
              rows + (i / 2 * 8 + lane / 4) * kStride + (2 * k + i % 2) * 8 + lane % 4 * 2);
      }
      matrix_multiply_add<T>(c[0], a[k], b[0], b[1]);
      matrix_multiply_add<T>(c[1], a[k], b[2], b[3]);
    }
  }

  // gain (16 × D) += weights (16 × 16, as `scores` leaves them) · rows (16 × D)
  __device__ void accumulate(float (&gain)[2 * K][4], const float (&weights)[2][4],
                             const T* rows) const {
    const uint32_t a[4] = {pack<T>(weights[0][0], weights[0][1]),
                           pack<T>(weights[0][2], weights[0][3]),
                           pack<T>(weights[1][0], weights[1][1]),
                           pack<T>(weights[1][2], weights[1][3])};
    const T* mine = rows + (lane / 8 % 2 * 8 + lane % 8) * kStride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < 2 * K; n += 2) {  // 8 channels each
      uint32_t columns[4];
      load_transposed(columns, mine + n * 8);
      matrix_multiply_add<T>(gain[n], a, columns[0], columns[1]);
      matrix_multiply_add<T>(gain[n + 1], a, columns[2], columns[3]);
    }
  }

  // Positions that element i of c[n] belongs to: mine, and of the 16 rows from `at` on.
  __device__ int mine(int i) const { return first + lane / 4 + i / 2 * 8; }
  __device__ int theirs(int at, int n, int i) const {
    return at + n * 8 + lane % 4 * 2 + i % 2;
  }

  __device__ uint32_t dropout_row_at(int position) const {
    return dropout.row(dropout_head, position);
  }
  __device__ int64_t statistics_at(int position) const {
    return (b * p.h + h) * p.n_q + position - offset;
  }

  // Write the warp's 16 rows, times `by[row]`, rotated back if `rotated`, to a contiguous
  // (B, length, H, D); rows go through shared memory to be stored 16 bytes at a time.
  __device__ void write(void* to, int offset, float (&gain)[2 * K][4], const float (&by)[2],
                        bool rotated) const {
    __syncthreads();  // nobody reads x and y any more
    T* rows = x + (first - start) * kStride;
#pragma unroll
    for (int n = 0; n < 2 * K; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int channel = n * 8 + lane % 4 * 2;
        const int position = mine(2 * half);
        float even = gain[n][2 * half] * by[half], odd = gain[n][2 * half + 1] * by[half];
        if (rotated && p.cos && channel < p.d && position < n_k) {
          const int64_t at = (position * p.d + channel) / 2;
          const float turned = even * p.cos[at] + odd * p.sin[at];
          odd = odd * p.cos[at] - even * p.sin[at], even = turned;
        }
        *reinterpret_cast<uint32_t*>(rows + (lane / 4 + half * 8) * kStride + channel) =
            pack<T>(even, odd);
      }
    __syncwarp();
    for (int piece = lane; piece < 16 * 2 * K; piece += 32) {
      const int row = piece / (2 * K), slot = piece % (2 * K);
      const int position = first + row;
      if (slot * 8 < p.d && position >= offset && position < n_k)
        *reinterpret_cast<uint4*>(static_cast<T*>(to) + slot * 8 +
                                  p.contiguous_row(b, position - offset, h, n_k - offset)) =
            *reinterpret_cast<const uint4*>(rows + row * kStride + slot * 8);
    }
  }
};

}  // namespace tensor_cores
}  // namespace equimini
