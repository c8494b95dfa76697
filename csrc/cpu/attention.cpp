// Entry points of the CPU kernels: which kernel, which dtype, and work for every thread.
#include "attention.h"

#include "narrow.h"
#include "tiles_backward.h"
#include "tiles_forward.h"

namespace equimini {

template <bool Backward, class T, class C>
void run(const Attention& p, const Parallel& parallel) {
  const bool narrow_window = is_narrow(p);
  const int64_t chunk = narrow_chunk<Backward>(p, parallel.threads);
  const int64_t items = narrow_window ? narrow_items<Backward>(p, chunk)
                        : Backward    ? backward_items<C>(p) : forward_items<C>(p);
  const int64_t keys = std::min(p.window, p.n_k) + (narrow_window ? 0 : kLanes<C>);
  const int64_t cost = p.b * p.h * (Backward ? p.n_k : p.n_q) * keys * p.d;
  const int64_t grain = 1 + (items << 18) / std::max<int64_t>(cost, 1);  // some 10 µs
  parallel.run(items, grain, [&](int64_t begin, int64_t end) {
    if (narrow_window && p.d == 64) narrow<Backward, 64, T, C>(p, chunk, begin, end);
    else if (narrow_window) narrow<Backward, 0, T, C>(p, chunk, begin, end);
    else if constexpr (Backward) backward<T, C>(p, begin, end);
    else forward<T, C>(p, begin, end);
  });
}

template <bool Backward>
void run(const Attention& p, Dtype dtype, const Parallel& parallel) {
  switch (dtype) {
    case Dtype::float32: return run<Backward, float, float>(p, parallel);
    case Dtype::float64: return run<Backward, double, double>(p, parallel);
    case Dtype::bfloat16: return run<Backward, BFloat16, float>(p, parallel);
    default: return run<Backward, Float16, float>(p, parallel);
  }
}

void cpu_forward(const Attention& p, Dtype dtype, const Parallel& parallel) {
  run<false>(p, dtype, parallel);
}

void cpu_backward(const Attention& p, Dtype dtype, const Parallel& parallel) {
  run<true>(p, dtype, parallel);
}

}  // namespace equimini
