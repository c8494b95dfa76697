// The CPU kernels, callable without torch's headers.
#pragma once
#include <functional>

#include "../attention.h"

namespace equimini {

// Runs body(begin, end) for ranges that together are 0 … items − 1, none shorter than grain, on
// `threads` threads.
struct Parallel {
  int threads;
  std::function<void(int64_t items, int64_t grain,
                     const std::function<void(int64_t begin, int64_t end)>& body)> run;
};

void cpu_forward(const Attention& p, Dtype dtype, const Parallel& parallel);
void cpu_backward(const Attention& p, Dtype dtype, const Parallel& parallel);

}  // namespace equimini
