// The CUDA kernels as a library for the CPU; emulation.py compiles and calls it.
#include "cuda/attention.cu"

extern "C" {

void set_schedule(unsigned seed) { cuda_on_cpu::machine.random.seed(seed); }

int forward(const equimini::Attention* p, int dtype, int path) {
  return equimini::cuda_forward(*p, equimini::Dtype(dtype), nullptr, equimini::Path(path));
}

int backward(const equimini::Attention* p, int dtype, int path, float* delta) {
  return equimini::cuda_backward(*p, equimini::Dtype(dtype), nullptr, delta,
                                 equimini::Path(path));
}

const char* error_string(int error) { return equimini::cuda_error_string(error); }

}  // extern "C"
