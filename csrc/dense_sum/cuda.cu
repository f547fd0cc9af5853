// dense_sum on CUDA: checks -> params -> launch. Meaning: dnl_kernels/ops/dense_sum/reference.py.
#include "common/launch.cuh"
#include "dense_sum/kernel.cuh"

namespace dnl {
namespace {

using torch::stable::contiguous;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The contiguous tensors, their pointers in `params`, and how the kernels may access them.
struct Prepared {
  std::vector<Tensor> tensors;
  Tensor weight;
  DenseSumSizes sizes;
  bool vectors = true;  // 16-byte accesses: pointers aligned, no pack across a change of channel
  bool across = false;  // channels last
};

template <class Params>
Prepared prepare(const std::vector<Tensor>& states, const Tensor& weight, int64_t channel_dim, Params& params) {
  DNL_CHECK(!states.empty() && states.size() <= kDenseSumMaxStates, "dense_sum: CUDA takes 1 to ",
            kDenseSumMaxStates, " states, not ", states.size());
  const Tensor& first = states[0];
  Prepared r{{}, contiguous(weight), {1, 1, 1, static_cast<int>(states.size())}};
  DNL_CHECK(weight.scalar_type() == first.scalar_type(), "dense_sum: weight's element type differs");
  for (size_t j = 0; j < states.size(); j++) {
    DNL_CHECK(same_sizes(states[j], first) && states[j].scalar_type() == first.scalar_type(),
              "dense_sum: states differ");
    DNL_CHECK(states[j].device() == first.device() && weight.device() == first.device(), "dense_sum: devices differ");
    r.tensors.push_back(contiguous(states[j]));
    params.states[j] = r.tensors.back().data_ptr();
    r.vectors = r.vectors && aligned(params.states[j]);
  }
  DenseSumSizes& s = r.sizes;
  if (weight.dim() == 2) {
    DNL_CHECK(channel_dim >= 0 && channel_dim < first.dim(), "dense_sum: channel_dim out of range");
    for (int64_t d = 0; d < channel_dim; d++) s.outer *= first.size(d);
    for (int64_t d = channel_dim + 1; d < first.dim(); d++) s.inner *= first.size(d);
    s.channels = first.size(channel_dim);
    r.across = s.inner == 1;
    r.vectors = r.vectors && (!r.across || aligned(r.weight.data_ptr()));
  } else {
    s.inner = first.numel();
  }
  r.vectors = r.vectors && (r.across ? s.channels : s.inner) * first.element_size() % 16 == 0;
  DNL_CHECK(weight.numel() == s.count * s.channels, "dense_sum: weight has the wrong number of elements");
  params.weight = r.weight.data_ptr();
  params.sizes = s;
  return r;
}

// body(T{}, elements per access, channels last), the last two as constants.
template <class Body>
void dispatch_access(ScalarType type, const Prepared& in, Body body) {
  dispatch_device("dense_sum", type, [&](auto zero) {
    using T = decltype(zero);
    using Wide = std::integral_constant<int, 16 / sizeof(T)>;
    using One = std::integral_constant<int, 1>;
    if (in.across && in.vectors) return body(zero, Wide{}, std::true_type{});
    if (in.across) return body(zero, One{}, std::true_type{});
    if (in.vectors) return body(zero, Wide{}, std::false_type{});
    return body(zero, One{}, std::false_type{});
  });
}

Tensor dense_sum_fwd(const std::vector<Tensor>& states, const Tensor& weight, int64_t channel_dim) {
  DenseSumForward params;
  Prepared in = prepare(states, weight, channel_dim, params);
  Tensor y = torch::stable::empty_like(in.tensors[0]);
  if (y.numel() == 0) return y;
  params.y = y.data_ptr();
  in.vectors = in.vectors && aligned(params.y);
  Launcher launch(y);
  dispatch_access(y.scalar_type(), in, [&](auto zero, auto elements, auto across) {
    const int64_t blocks = ceil_div(y.numel(), int64_t(kDenseSumThreads) * elements);
    launch("dense_sum_fwd", dense_sum_fwd_kernel<decltype(zero), elements, across>, dim3(blocks), kDenseSumThreads, 0,
           params);
  });
  return y;
}

std::tuple<std::vector<Tensor>, Tensor> dense_sum_bwd(const Tensor& dy_in, const std::vector<Tensor>& states,
                                                      const Tensor& weight, int64_t channel_dim, bool need_states,
                                                      bool need_weight) {
  DenseSumBackward params;
  Prepared in = prepare(states, weight, channel_dim, params);
  DNL_CHECK(same_sizes(dy_in, states[0]) && dy_in.scalar_type() == weight.scalar_type(),
            "dense_sum: dy differs from the states");
  const Tensor dy = contiguous(dy_in);
  params.dy = dy.data_ptr();
  params.need_states = need_states;
  params.need_weight = need_weight;
  in.vectors = in.vectors && aligned(params.dy);
  std::vector<Tensor> dstates;
  for (int j = 0; need_states && j < in.sizes.count; j++) {
    dstates.push_back(torch::stable::empty_like(dy));
    params.dstates[j] = dstates[j].data_ptr();
    in.vectors = in.vectors && aligned(params.dstates[j]);
  }
  const int64_t rows = in.sizes.count * in.sizes.channels;
  Tensor dweight = torch::stable::new_zeros(in.weight, {need_weight ? in.sizes.count : 0, in.sizes.channels});
  if (weight.dim() == 1) dweight = torch::stable::flatten(dweight);
  if (dy.numel() == 0 || !(need_states || need_weight)) return {dstates, dweight};
  Launcher launch(dy);
  dispatch_access(dy.scalar_type(), in, [&](auto zero, auto elements, auto across) {
    using T = decltype(zero);
    using Tile = DenseSumTile<elements, across>;
    const DenseSumSizes& s = params.sizes;
    params.tiles = ceil_div(across ? s.outer : s.outer * s.inner, Tile::kLength);
    Tensor partial = torch::stable::new_empty(dy, {need_weight ? rows * params.tiles : 0}, ScalarType::Float);
    params.partial = static_cast<float*>(partial.data_ptr());
    launch("dense_sum_bwd", dense_sum_bwd_kernel<T, elements, across>,
           dim3(params.tiles * ceil_div(s.channels, Tile::kColumns)), kDenseSumThreads, 0, params);
    if (need_weight)
      launch("sum_partials", sum_partials_kernel<T>, dim3(ceil_div(rows, kDenseSumWarps)), kDenseSumThreads, 0,
             static_cast<const float*>(params.partial), static_cast<T*>(dweight.data_ptr()), rows, params.tiles);
  });
  return {dstates, dweight};
}

}  // namespace
}  // namespace dnl

DNL_CUDA_LIBRARY(m) {
  m.impl("dense_sum_fwd", TORCH_BOX(&dnl::dense_sum_fwd));
  m.impl("dense_sum_bwd", TORCH_BOX(&dnl::dense_sum_bwd));
}
