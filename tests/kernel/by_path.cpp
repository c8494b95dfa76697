// The CPU kernels as a library like by_path.cu's, on one thread.  emulation.py calls it.
#include "cpu/attention.cpp"

extern "C" {

static const equimini::Parallel kAlone{
    1, [](int64_t items, int64_t, const auto& body) { body(0, items); }};

int forward(const equimini::Attention* p, int dtype, int) {
  equimini::cpu_forward(*p, equimini::Dtype(dtype), kAlone);
  return 0;
}

int backward(const equimini::Attention* p, int dtype, int, float*) {
  equimini::cpu_backward(*p, equimini::Dtype(dtype), kAlone);
  return 0;
}

const char* error_string(int) { return ""; }

}  // extern "C"
