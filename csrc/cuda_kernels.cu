// Entry points of the CUDA kernels: which family, which dtype.
#include "cuda_kernels.h"

#include "cuda_cores.cuh"
#include "tensor_cores.cuh"

namespace equimini {

static int run(bool backward, Attention p, Dtype dtype, void* stream, float* delta, Path path) {
  p.window = std::min(p.window, p.n_k);
  const bool tensor = dtype != Dtype::float32 && path != Path::cuda_cores &&
                      (path == Path::tensor_cores || p.window >= kTensorWindow);
  switch (dtype) {
    case Dtype::float32: return cuda_cores::run<float>(backward, p, stream);
    case Dtype::bfloat16:
      return tensor ? tensor_cores::run<bfloat16>(backward, p, stream, delta)
                    : cuda_cores::run<bfloat16>(backward, p, stream);
    default:
      return tensor ? tensor_cores::run<float16>(backward, p, stream, delta)
                    : cuda_cores::run<float16>(backward, p, stream);
  }
}

int cuda_forward(const Attention& p, Dtype dtype, void* stream, Path path) {
  return run(false, p, dtype, stream, nullptr, path);
}

int cuda_backward(const Attention& p, Dtype dtype, void* stream, float* delta, Path path) {
  return run(true, p, dtype, stream, delta, path);
}

const char* cuda_error_string([[maybe_unused]] int error) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return cuda_on_cpu::machine.error.c_str();
#endif
}

}  // namespace equimini
