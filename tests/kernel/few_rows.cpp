// Random shapes through csrc/cpu/few_rows.h, for the sanitizers and for other processors: inputs
// lie in buffers of exactly their size; prints what comes out.  tests/sampling/test_few_rows.py runs it.
#include <stdlib.h>

#include <cstdio>
#include <random>
#include <vector>

#include "cpu/few_rows.h"
#include "parallel.h"

using namespace equimini;

static std::mt19937 draw(7);
static std::vector<void*> held;

template <class T = float>
T* numbers(int64_t n, float scale = 1) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, n * sizeof(T))) abort();
  held.push_back(memory);
  for (int64_t i = 0; i < n; i++) {
    const float x = scale * (int(draw() % 2001) - 1000) / 1000;
    // a bfloat16 is the upper half of a float
    std::memcpy(static_cast<T*>(memory) + i, reinterpret_cast<const char*>(&x) + 4 - sizeof(T),
                sizeof(T));
  }
  return static_cast<T*>(memory);
}
static int64_t between(int64_t low, int64_t high) { return low + draw() % (high - low + 1); }
static void show(const char* name, const float* y, int64_t n) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) sum += y[i] * (i % 7), squares += y[i] * y[i];
  std::printf("%s %.9g %.9g\n", name, sum / n, squares / n);
}

template <class T>
void one_case() {
#ifdef THREADS  // tests/kernel/threads.cpp says how
  const Parallel parallel = on_threads();
#else
  const Parallel parallel = in_turn(3);
#endif
  const int64_t rows = between(1, 30), in = between(1, 70), out = between(1, 70);
  float* y = numbers(rows * padded(out));
  linear(y, numbers(rows * in), rows, in, out, numbers<T>(padded(out) * in), numbers(padded(out)),
         parallel);
  show("linear", y, rows * padded(out));

  const int64_t c = between(1, 70), w = between(1, 70), depth = between(0, 3), pw = padded(w);
  float* vectors = numbers(pw + depth * (kPanel + 4 * pw) + kPanel + padded(c), 0.2f);
  for (int64_t i = 0; i <= depth; i++) vectors[pw + i * (kPanel + 4 * pw)] = 1e-6f;
  Head h{rows, c, w, depth, numbers(rows * c), numbers(rows * (3 * depth + 2) * w), numbers(rows * c)};
  run(h, numbers<T>(pw * c + depth * 2 * pw * w + padded(c) * w, 0.3f), vectors, parallel);
  show("head", h.v, rows * c);

  const int64_t heads = between(1, 3), d = heads * 8 * between(1, 4), pd = padded(d);
  const int64_t window = between(1, 6), known = between(0, window - 1), layers = between(1, 3);
  const int64_t classes = between(1, 9);
  const int64_t norm = kPanel + 2 * pd, layer = 3 * norm + padded(3 * d) + 4 * pd + padded(4 * d);
  vectors = numbers(pd + norm + layers * layer + norm, 0.2f);
  vectors[pd] = vectors[pd + norm + layers * layer] = 1e-6f;
  for (int64_t i = 0; i < layers; i++) {
    float* at = vectors + pd + norm + i * layer;
    at[0] = at[norm + padded(3 * d) + pd] = at[2 * norm + padded(3 * d) + 3 * pd] = 1e-5f;
  }
  std::vector<const float*> pairs;
  for (int64_t i = 0; i < 2 * layers; i++) pairs.push_back(numbers(rows * known * d));
  for (int64_t i = 0; i < 2 * layers; i++) pairs.push_back(numbers(rows * classes * d));
  const int64_t half = d / heads / 2;
  Token p{rows, c, d, heads, window, layers, known, classes, numbers(rows * c), pairs.data(),
          pairs.data() + 2 * layers, numbers((known + 1) * half), numbers((known + 1) * half),
          numbers(half), numbers(half), numbers(rows * d), nullptr};
  const int64_t kept = 2 * layers * rows * p.kept() * d;
  p.cache = numbers(kept);
  run(p, numbers<T>(pd * c + layers * (padded(3 * d) * d + 4 * pd * d + padded(4 * d) * d + pd * 4 * d),
                      0.3f), vectors, parallel);
  show("token", p.z, rows * d);
  if (kept) show("cache", p.cache, kept);
  for (void* memory : held) free(memory);
  held.clear();
}

int main() {
  for (int i = 0; i < 20; i++) one_case<float>(), one_case<BFloat16>();
}
