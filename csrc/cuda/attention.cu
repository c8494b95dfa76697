// Entry points of the CUDA kernels: which family, which dtype.
#include "kernels.h"
#include "registers.cuh"
#include "shared_memory.cuh"
#include "tensor_cores.cuh"

namespace equimini {

template <class T>
int run(bool backward, const Attention& p, void* stream, float* delta, Path path) {
  if (path == Path::automatic)
    path = p.window <= kRegisterWindow                  ? Path::registers
           : p.window < kTensorWindow || sizeof(T) == 4 ? Path::shared_memory
                                                        : Path::tensor_cores;
  if (path == Path::registers && p.window <= kRegisterWindow)
    return registers::run<T>(backward, p, stream);
  if constexpr (sizeof(T) == 2)
    if (path == Path::tensor_cores) return tensor_cores::run<T>(backward, p, stream, delta);
  return shared_memory::run<T>(backward, p, stream);
}

static int run(bool backward, Attention p, Dtype dtype, void* stream, float* delta, Path path) {
  p.window = std::min(p.window, p.n_k);
  switch (dtype) {
    case Dtype::float32: return run<float>(backward, p, stream, delta, path);
    case Dtype::bfloat16: return run<bfloat16>(backward, p, stream, delta, path);
    default: return run<float16>(backward, p, stream, delta, path);
  }
}

int cuda_forward(const Attention& p, Dtype dtype, void* stream, Path path) {
  return run(false, p, dtype, stream, nullptr, path);
}

int cuda_backward(const Attention& p, Dtype dtype, void* stream, float* delta, Path path) {
  return run(true, p, dtype, stream, delta, path);
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace equimini
