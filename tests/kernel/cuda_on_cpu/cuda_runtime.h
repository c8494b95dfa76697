// The CUDA runtime on the CPU, for tests: found before the real header of this name, it lets g++
// compile the .cu files of csrc/ and runs their kernels.
//
// Every thread of a block is a fiber (ucontext).  A fiber runs until it reaches a barrier, a
// shuffle or a tensor-core instruction, or returns; then the next one is drawn at random, with
// some warps held back, so that where a barrier is missing, readers overtake writers and writers
// those who still read.  Blocks run in random order, too, one after the other.  Shared memory has
// exactly the size of the launch (the sanitizers see what lies beyond, and misaligned accesses)
// and starts as NaNs.  What threads may not do is reported as the launch's error: lanes of a warp
// that meet in different shuffles, a lane that returned while others wait for it, a barrier that
// not all threads reach.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
namespace cuda_on_cpu {

struct Index { unsigned x; };

// Where a thread waits: a barrier of the block, or something that lanes of a warp do together.
struct Meeting {
  const char* what;
  unsigned line;
  uint32_t mask;  // lanes that take part; 0 for the whole block
  int argument;   // has to be the same in all of them
  bool operator==(const Meeting&) const = default;
};

struct Fiber {
  enum State { ready, waiting, done } state = ready;
  ucontext_t context;
  Meeting meeting{};
  unsigned char given[32];  // what this lane puts into an exchange
};

struct Machine {
  static constexpr size_t kStack = 256 * 1024;
  std::mt19937 random{0};
  std::string error;
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> shared, stacks;
  size_t stack_count = 0;
  ucontext_t scheduler;
  int current = 0;
  unsigned block = 0;
  std::function<void()> kernel;
};
inline Machine machine;

inline void fail(const std::string& why) {
  if (machine.error.empty()) machine.error = why;
}

inline std::string describe(int thread) {
  const Meeting& at = machine.fibers[thread].meeting;
  std::ostringstream text;
  text << "thread " << thread << " at " << at.what << " (line " << at.line << ", mask " << std::hex
       << at.mask << std::dec << ", argument " << at.argument << ")";
  return text.str();
}

// The current thread arrived.  If it was the last, all who wait with it go on.
inline void arrive() {
  auto& fibers = machine.fibers;
  const Meeting& mine = fibers[machine.current].meeting;
  const int first = mine.mask ? machine.current / 32 * 32 : 0;
  const int last = mine.mask ? std::min<int>(first + 32, fibers.size()) : fibers.size();
  bool complete = true;
  for (int other = first; other < last; other++) {
    if (mine.mask && !(mine.mask >> (other - first) & 1)) continue;
    const Fiber& fiber = fibers[other];
    if (fiber.state == Fiber::done && mine.mask)
      return fail(describe(machine.current) + " waits for thread " + std::to_string(other) +
                  ", which has returned");
    const bool elsewhere = fiber.state == Fiber::waiting && fiber.meeting != mine;
    const bool same_warp = other / 32 == machine.current / 32;
    if (elsewhere && (same_warp || !fiber.meeting.mask))  // other warps may be at other things
      return fail(describe(machine.current) + " meets " + describe(other));
    complete &= fiber.state != Fiber::ready && !elsewhere;
  }
  for (int other = first; complete && other < last; other++)
    if (fibers[other].state == Fiber::waiting && fibers[other].meeting == mine)
      fibers[other].state = Fiber::ready;
}

inline void meet(const Meeting& meeting) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.meeting = meeting;
  fiber.state = Fiber::waiting;
  arrive();
  swapcontext(&fiber.context, &machine.scheduler);
}

// Lanes give a value each and read those of others, then meet again before any value changes.
template <class Value, class Read>
auto exchange(const Meeting& meeting, const Value& value, Read read) {
  static_assert(sizeof(Value) <= sizeof(Fiber::given));
  std::memcpy(machine.fibers[machine.current].given, &value, sizeof(Value));
  meet(meeting);
  const int warp = machine.current / 32 * 32;
  auto result = read([warp](int lane) {
    Value given;
    std::memcpy(&given, machine.fibers[warp + lane].given, sizeof(Value));
    return given;
  });
  meet(meeting);
  return result;
}

inline void fiber_main() {
  machine.kernel();
  machine.fibers[machine.current].state = Fiber::done;
  for (auto& fiber : machine.fibers)  // a barrier may have waited for this thread alone
    if (fiber.state == Fiber::waiting && !fiber.meeting.mask) {
      const int self = machine.current;
      machine.current = int(&fiber - machine.fibers.data());
      arrive();
      machine.current = self;
      break;
    }
  swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

inline void run_block(int threads, size_t shared) {
  machine.shared.reset(new unsigned char[shared]);
  std::memset(machine.shared.get(), 0xff, shared);  // NaN as float, bfloat16 and float16
  machine.fibers.assign(threads, Fiber{});
  for (int thread = 0; thread < threads; thread++) {
    ucontext_t& context = machine.fibers[thread].context;
    getcontext(&context);
    context.uc_stack = {machine.stacks.get() + thread * Machine::kStack, 0, Machine::kStack};
    makecontext(&context, fiber_main, 0);
  }
  std::vector<int> ready, held_back;
  unsigned slow = machine.random();  // these warps wait until no other can go on
  while (machine.error.empty()) {
    ready.clear(), held_back.clear();
    bool all_done = true;
    for (int thread = 0; thread < threads; thread++) {
      all_done &= machine.fibers[thread].state == Fiber::done;
      if (machine.fibers[thread].state == Fiber::ready)
        (slow >> thread / 32 & 1 ? held_back : ready).push_back(thread);
    }
    if (all_done) return;
    if (ready.empty()) ready.swap(held_back), slow = machine.random();
    if (ready.empty()) {
      for (int thread = 0; thread < threads; thread++)
        if (machine.fibers[thread].state == Fiber::waiting)
          return fail("stuck: " + describe(thread) + ", and not all it waits for come");
    }
    std::shuffle(ready.begin(), ready.end(), machine.random);
    for (int thread : ready) {  // a fiber that becomes ready meanwhile waits for the next round
      if (!machine.error.empty()) return;
      machine.current = thread;
      swapcontext(&machine.scheduler, &machine.fibers[thread].context);
    }
  }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::Index{unsigned(cuda_on_cpu::machine.current)})
#define blockIdx (cuda_on_cpu::Index{cuda_on_cpu::machine.block})

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  cuda_on_cpu::meet({"__syncthreads", at.line(), 0, 0});
}
inline void __syncwarp(std::source_location at = std::source_location::current()) {
  cuda_on_cpu::meet({"__syncwarp", at.line(), 0xffffffffu, 0});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes,
                  std::source_location at = std::source_location::current()) {
  const int lane = cuda_on_cpu::machine.current % 32;
  return cuda_on_cpu::exchange({"__shfl_xor_sync", at.line(), mask, lanes}, value,
                               [&](auto given) { return given(lane ^ lanes); });
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct dim3 { unsigned x; };

inline cudaError_t cudaGetLastError() {
  return cuda_on_cpu::machine.error.empty() ? cudaSuccess : cudaErrorUnknown;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorUnknown ? cuda_on_cpu::machine.error.c_str() : "a launch that is too large";
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                             void** arguments, size_t shared, cudaStream_t) {
  auto& machine = cuda_on_cpu::machine;
  machine.error.clear();
  machine.kernel = [&]<size_t... i>(std::index_sequence<i...>) {
    return std::function<void()>([=] { kernel(*static_cast<Parameters*>(arguments[i])...); });
  }(std::index_sequence_for<Parameters...>());
  if (!machine.stacks) machine.stacks.reset(new unsigned char[1024 * machine.kStack]);
  std::vector<unsigned> order(blocks.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), machine.random);
  for (unsigned block : order) {
    machine.block = block;
    cuda_on_cpu::run_block(threads.x, shared);
    if (!machine.error.empty()) break;
  }
  return cudaGetLastError();
}
