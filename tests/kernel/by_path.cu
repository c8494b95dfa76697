// The CUDA kernels as a library that takes the kernel family as an argument: compiled by nvcc for
// a GPU, or by g++ with cuda_on_cpu's headers (cuda_on_cpu/library.cpp).  emulation.py calls it.
#include "cuda/attention.cu"

extern "C" {

int forward(const equimini::Attention* p, int dtype, int path) {
  return equimini::cuda_forward(*p, equimini::Dtype(dtype), nullptr, equimini::Path(path));
}

int backward(const equimini::Attention* p, int dtype, int path, float* delta) {
  return equimini::cuda_backward(*p, equimini::Dtype(dtype), nullptr, delta,
                                 equimini::Path(path));
}

const char* error_string(int error) { return equimini::cuda_error_string(error); }

}  // extern "C"
