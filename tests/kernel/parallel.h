// Work for the CPU kernels, in turn or, with THREADS, on OpenMP's as at::parallel_for.
#pragma once
#include <algorithm>

#include "cpu/attention.h"
#ifdef THREADS
#include <omp.h>
#endif

namespace equimini {

inline Parallel in_turn(int parts) {
  return {parts, [parts](int64_t n, int64_t, const auto& body) {
            for (int i = 0; i < parts; i++)
              if (n * i / parts < n * (i + 1) / parts) body(n * i / parts, n * (i + 1) / parts);
          }};
}

#ifdef THREADS
inline Parallel on_threads() {
  return {omp_get_max_threads(), [](int64_t n, int64_t, const auto& body) {
#pragma omp parallel
            {
              const int64_t parts = omp_get_num_threads(), part = (n + parts - 1) / parts;
              const int64_t begin = omp_get_thread_num() * part;
              if (begin < n) body(begin, std::min(n, begin + part));
            }
          }};
}
#endif

}  // namespace equimini
