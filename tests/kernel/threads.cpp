// The CPU kernels on OpenMP's threads, for the thread sanitizer with Clang and its own OpenMP
// (GCC's runtime reports false races).  From the checkout:
//
//   clang++ -std=c++20 -O1 -g -march=haswell -fsanitize=thread -fopenmp -DTHREADS \
//     -I csrc -o /tmp/threads tests/kernel/threads.cpp  # and the same for tests/kernel/few_rows.cpp
//   TSAN_OPTIONS=ignore_noninstrumented_modules=1 OMP_NUM_THREADS=4 setarch -R /tmp/threads 1000
//
// Random shapes of every dtype; what four threads give must be what one gives, bit for bit.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/attention.cpp"
#include "parallel.h"

using namespace equimini;

static std::mt19937 draw(1);
static int64_t between(int64_t low, int64_t high) { return low + draw() % (high - low + 1); }

template <class T>
std::vector<T> numbers(int64_t n, Dtype dtype) {
  std::vector<T> made(n);
  for (T& x : made) {
    if constexpr (sizeof(T) > 2) x = T(int(draw() % 2001) - 1000) / 1000;
    else x = dtype == Dtype::bfloat16 ? (draw() & 0x80ff) | 0x3f00 : (draw() & 0x83ff) | 0x3800;
  }
  return made;
}

template <class T, class C>  // of inputs and gradients; of the sums that are kept
void one_case(Dtype dtype) {
  Attention p{};
  p.b = between(1, 3), p.h = between(1, 4), p.d = 8 * between(1, 12), p.n_q = between(1, 80);
  p.n_k = p.n_q + between(0, 9), p.window = between(1, 40), p.scale = 0.2;
  const int64_t queries = p.b * p.n_q * p.h * p.d, keys = p.b * p.n_k * p.h * p.d, seed = draw();
  p.keep_factor = 1.25, p.drop_below = draw() % 2 ? 1u << 30 : 0, p.seed = p.drop_below ? &seed : nullptr;
  const auto q = numbers<T>(queries, dtype), k = numbers<T>(keys, dtype),
             v = numbers<T>(keys, dtype), grad = numbers<T>(queries, dtype);
  const auto cos = numbers<float>(p.n_k * p.d / 2, dtype), sin = cos;
  if (draw() % 2) p.cos = cos.data(), p.sin = sin.data();
  const auto heads = [&](const std::vector<T>& x, int64_t n) {
    return Heads{x.data(), n * p.h * p.d, p.h * p.d, p.d};
  };
  p.q = heads(q, p.n_q), p.k = heads(k, p.n_k), p.v = heads(v, p.n_k), p.grad = heads(grad, p.n_q);
  std::vector<T> out[2], dq[2], dk[2], dv[2];
  std::vector<C> lse[2];
  for (int alone = 0; alone < 2; alone++) {
    p.out = (out[alone].resize(queries), out[alone].data());
    p.dq = (dq[alone].resize(queries), dq[alone].data());
    p.dk = (dk[alone].resize(keys), dk[alone].data());
    p.dv = (dv[alone].resize(keys), dv[alone].data());
    p.lse = (lse[alone].resize(p.b * p.h * p.n_q), lse[alone].data());
    cpu_forward(p, dtype, alone ? in_turn(1) : on_threads());
    cpu_backward(p, dtype, alone ? in_turn(1) : on_threads());
  }
  if (out[0] != out[1] || dq[0] != dq[1] || dk[0] != dk[1] || dv[0] != dv[1] || lse[0] != lse[1]) {
    std::printf("dtype %d, %ld queries, window %ld: threads change the result\n", int(dtype),
                long(p.n_q), long(p.window));
    std::exit(1);
  }
}

int main(int, char** words) {
  const int cases = std::atoi(words[1]);
  for (int i = 0; i < cases; i++) {
    one_case<float, float>(Dtype::float32), one_case<double, double>(Dtype::float64);
    one_case<uint16_t, float>(Dtype::bfloat16), one_case<uint16_t, float>(Dtype::float16);
  }
  std::printf("%d cases of each dtype on %d threads: right\n", cases, on_threads().threads);
}
