// The compiled kernels as implementations of the operators that equimini/attention.py defines:
// describes the tensors to the kernels, and nothing more.  Shapes were checked in Python.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>

#include <deque>

#include "cpu/attention.h"
#include "cpu/processor.h"
#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#endif

namespace equimini {

void register_few_rows();  // few_rows.cpp

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors of one call, in a layout that the kernels read; they live while the call runs.
struct Call {
  std::deque<Tensor> held;  // a reference to an element outlives the next one's arrival
  Attention p{};

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos,
       const OptionalTensor& sin, const OptionalTensor& seed, int64_t window, double dropout_p,
       double scale) {
    p.b = q.size(0), p.n_q = q.size(1), p.h = q.size(2), p.d = q.size(3), p.n_k = k.size(1);
    p.window = window, p.scale = scale, p.keep_factor = 1 / (1 - dropout_p);
    p.drop_below = static_cast<uint32_t>(dropout_p * 4294967296.0);  // 2³²
    p.q = heads(q), p.k = heads(k), p.v = heads(v);
    if (cos) {
      p.cos = static_cast<const float*>(rows(*cos));
      p.sin = static_cast<const float*>(rows(*sin));
    }
    if (seed) p.seed = seed->const_data_ptr<int64_t>();
  }

  const void* rows(const Tensor& x) {  // contiguous, from a multiple of 16 bytes on
    const bool in_place = x.is_contiguous() && aligned(x);
    return (in_place ? x : held.emplace_back(x.clone(at::MemoryFormat::Contiguous)))
        .const_data_ptr();
  }
  static bool aligned(const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  }

  // Rows are read where they lie.  A copy is made where the last dimension is not contiguous,
  // or, for CUDA's 16-byte loads, where a row does not start at a multiple of 16 bytes.
  Heads heads(const Tensor& x) {
    bool in_place = x.stride(3) == 1;
    if (x.is_cuda()) {
      const int64_t step = 16 / x.element_size();
      in_place &= aligned(x);
      for (int64_t dim = 0; dim < 3; dim++) in_place &= x.stride(dim) % step == 0;
    }
    const Tensor& y = in_place ? x : held.emplace_back(x.clone(at::MemoryFormat::Contiguous));
    return {y.const_data_ptr(), y.stride(0), y.stride(1), y.stride(2)};
  }
};

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    default: return Dtype::float16;
  }
}

void run_cpu(bool backward, const Attention& p, Dtype dtype) {
  const Parallel parallel{at::get_num_threads(), [](int64_t items, int64_t grain, const auto& body) {
    at::parallel_for(0, items, grain, body);
  }};
  backward ? cpu_backward(p, dtype, parallel) : cpu_forward(p, dtype, parallel);
}

#ifdef WITH_CUDA
void run_cuda(bool backward, const Attention& p, const Tensor& q) {
  const c10::cuda::CUDAGuard guard(q.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor delta = backward ? at::empty({p.b, p.h, p.n_q}, q.options().dtype(at::kFloat))
                                : Tensor();
  const int error = backward
                        ? cuda_backward(p, dtype_of(q), stream, delta.mutable_data_ptr<float>())
                        : cuda_forward(p, dtype_of(q), stream);
  TORCH_CHECK(error == 0, "window_attention: launching the CUDA kernel failed: ",
              cuda_error_string(error), " (the kernels need compute capability 8.0 or newer, and "
              "run on the GPUs that TORCH_CUDA_ARCH_LIST named when they were built; "
              "EQUIMINI_ATTENTION=reference does without them)");
}
#endif

void run(bool backward, const Attention& p, const Tensor& q) {
  if (q.numel() == 0) return;
#ifdef WITH_CUDA
  if (q.is_cuda()) return run_cuda(backward, p, q);
#endif
  run_cpu(backward, p, dtype_of(q));
}

void check(const Tensor& q, const Tensor& k, int64_t window) {
  TORCH_CHECK_VALUE(window >= 1, "window must be at least 1, got ", window);
  TORCH_CHECK_VALUE(k.size(1) < (1 << 30), "k must hold fewer than 2^30 tokens, got ", k.size(1));
  TORCH_CHECK_TYPE(!(q.is_cuda() && q.scalar_type() == at::kDouble),
                   "q must be float32, bfloat16 or float16 on CUDA, got float64");
}

std::tuple<Tensor, Tensor> window_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos,
    const OptionalTensor& sin, const OptionalTensor& seed, int64_t window, double dropout_p,
    double scale) {
  check(q, k, window);
  Call call(q, k, v, cos, sin, seed, window, dropout_p, scale);
  const auto lse_dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_dtype));
  call.p.out = out.mutable_data_ptr(), call.p.lse = lse.mutable_data_ptr();
  run(false, call.p, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& cos, const OptionalTensor& sin,
    const OptionalTensor& seed, int64_t window, double dropout_p, double scale) {
  check(q, k, window);
  Call call(q, k, v, cos, sin, seed, window, dropout_p, scale);
  call.p.grad = call.heads(grad);
  call.p.out = const_cast<void*>(call.rows(out));
  call.p.lse = const_cast<void*>(call.rows(lse));
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), q.options());
  Tensor dv = at::empty(k.sizes(), q.options());
  call.p.dq = dq.mutable_data_ptr();
  call.p.dk = dk.mutable_data_ptr(), call.p.dv = dv.mutable_data_ptr();
  if (q.numel() == 0) dk.zero_(), dv.zero_();
  run(true, call.p, q);
  return {dq, dk, dv};
}

torch::Library kernels_for(torch::Library library) {
  library.impl("window_attention", window_attention);
  library.impl("window_attention_backward", window_attention_backward);
  return library;
}

__attribute__((noinline)) void register_kernels() {  // for as long as the process lives
  new auto(kernels_for(MAKE_TORCH_LIBRARY_IMPL(equimini, CPU)));
#ifdef WITH_CUDA
  new auto(kernels_for(MAKE_TORCH_LIBRARY_IMPL(equimini, CUDA)));
#endif
}

}  // namespace
}  // namespace equimini

#define TEXT(...) #__VA_ARGS__
#define TEXT_OF(...) TEXT(__VA_ARGS__)

// Importing the module registers the kernels, where the processor has what they were compiled
// for; else `missing` names what it lacks.  `march` and `gpus`: what setup.py compiled for.
PyMODINIT_FUNC FOR_ANY_PROCESSOR PyInit__kernels() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  const char* missing = equimini::missing_instructions();
  if (!missing) equimini::register_kernels(), equimini::register_few_rows();
  PyModule_AddStringConstant(module, "missing", missing ? missing : "");
  PyModule_AddStringConstant(module, "march", TEXT_OF(COMPILED_FOR));
  PyModule_AddStringConstant(module, "gpus", TEXT_OF(COMPILED_FOR_GPUS));
  return module;
}
