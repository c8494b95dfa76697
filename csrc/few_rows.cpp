// The operators of cpu/few_rows.h, for sampling on a CPU; equimini/sampling/few_rows.py calls them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/few_rows.h"

namespace equimini {
namespace {

using at::Tensor;

// Calls run(matrix) with the weights' type.
template <class F>
void with_weights(const Tensor& matrix, F run) {
  if (matrix.scalar_type() == at::kBFloat16)
    run(static_cast<const BFloat16*>(matrix.const_data_ptr()));
  else
    run(matrix.const_data_ptr<float>());
}

const Parallel here() {
  return {at::get_num_threads(), [](int64_t items, int64_t grain, const auto& body) {
            at::parallel_for(0, items, grain, body);
          }};
}

// A product of packed weights: x (…, in) to (…, out).
Tensor few_rows_linear(const Tensor& x, const Tensor& matrix, const Tensor& vector, int64_t out) {
  const Tensor rows = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = padded(out);
  Tensor y = at::empty(shape, x.options());
  const int64_t in = x.size(-1);
  TORCH_CHECK(matrix.numel() == in * padded(out), "a layer for other than ", in, " channels");
  with_weights(matrix, [&](const auto* w) {
    linear(y.mutable_data_ptr<float>(), rows.const_data_ptr<float>(), x.numel() / in, in, out, w,
           vector.const_data_ptr<float>(), here());
  });
  return padded(out) == out ? y : y.narrow(-1, 0, out);
}

// FlowHead.velocity of x (…, channels), modulations (…, (3·depth + 2)·width).
Tensor few_rows_head(const Tensor& x, const Tensor& modulations, const Tensor& matrix,
                     const Tensor& vector, int64_t width, int64_t depth) {
  const Tensor from = x.contiguous(), of = modulations.contiguous();
  Tensor v = at::empty_like(from);
  const Head p{x.numel() / x.size(-1), x.size(-1), width, depth, from.const_data_ptr<float>(),
               of.const_data_ptr<float>(), v.mutable_data_ptr<float>()};
  with_weights(matrix, [&](const auto* w) {
    run(p, w, vector.const_data_ptr<float>(), here());
  });
  return v;
}

// Generator.forward of one token, x (B, 1, C), to z (B, 1, d) and the new cache
// (2·layers, B, n, H, D).  past, classes: keys and values of the layers in turn, (B, n, H, D).
std::tuple<Tensor, Tensor> few_rows_token(const Tensor& x, at::TensorList past,
                                          at::TensorList classes, const Tensor& cos,
                                          const Tensor& sin, const Tensor& cross_cos,
                                          const Tensor& cross_sin, const Tensor& matrix,
                                          const Tensor& vector, int64_t window) {
  const int64_t b = x.size(0), heads = classes[0].size(2), d = classes[0].size(3);
  const int64_t known = past.empty() || past[0].dim() < 2 ? 0 : past[0].size(1);
  bool fits = b == classes[0].size(0) && known < window;  // a cache may come from a file
  fits &= past.empty() || past.size() == classes.size();
  for (const Tensor& each : past) fits &= each.sizes() == at::IntArrayRef({b, known, heads, d});
  TORCH_CHECK(fits, "the cache of the columns before does not fit the generator and its context");
  std::vector<Tensor> held;
  std::vector<const float*> pointers;
  for (const auto& list : {past, classes})
    for (const Tensor& each : list)
      pointers.push_back(held.emplace_back(each.contiguous()).const_data_ptr<float>());
  const Tensor rows = x.contiguous();
  Token p{b, x.size(2), heads * d, heads, window, int64_t(classes.size()) / 2,
          known, classes[0].size(1), rows.const_data_ptr<float>(), pointers.data(),
          pointers.data() + past.size(), cos.const_data_ptr<float>(),
          sin.const_data_ptr<float>(), cross_cos.const_data_ptr<float>(),
          cross_sin.const_data_ptr<float>(), nullptr, nullptr};
  Tensor z = at::empty({b, 1, p.width}, x.options());
  Tensor cache = at::empty({int64_t(classes.size()), b, p.kept(), heads, d}, x.options());
  p.z = z.mutable_data_ptr<float>(), p.cache = cache.mutable_data_ptr<float>();
  with_weights(matrix, [&](const auto* w) {
    run(p, w, vector.const_data_ptr<float>(), here());
  });
  return {z, cache};
}

}  // namespace

void register_few_rows() {  // for as long as the process lives
  auto* library = new auto(MAKE_TORCH_LIBRARY(equimini_sampling));
  library->def("linear(Tensor x, Tensor matrix, Tensor vector, int out) -> Tensor",
               torch::dispatch(c10::DispatchKey::CPU, few_rows_linear));
  library->def("head(Tensor x, Tensor modulations, Tensor matrix, Tensor vector, int width, "
               "int depth) -> Tensor", torch::dispatch(c10::DispatchKey::CPU, few_rows_head));
  library->def("token(Tensor x, Tensor[] past, Tensor[] classes, Tensor cos, Tensor sin, "
               "Tensor cross_cos, Tensor cross_sin, Tensor matrix, Tensor vector, int window) -> "
               "(Tensor, Tensor)", torch::dispatch(c10::DispatchKey::CPU, few_rows_token));
}

}  // namespace equimini
