// dnl_layer on CUDA: checks -> params -> launch. Meaning: dnl_kernels/ops/dnl_layer/reference.py.
#include "common/conv_host.h"
#include "common/launch.cuh"
#include "dnl_layer/backward.cuh"

namespace dnl {
namespace {

using torch::stable::contiguous;
using Optional = std::optional<Tensor>;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

LayerKernel kernel_of(const std::string& name) {
  if (name == "softmax") return LayerKernel::softmax;
  if (name == "gaussian") return LayerKernel::gaussian;
  DNL_CHECK(name == "dot", "dnl_layer: CUDA has no kernel ", name);
  return LayerKernel::dot;
}

// What both passes are given besides the states' data.
struct Prepared {
  std::vector<Tensor> states, kept;  // the skip input is the last of the states
  LayerSizes sizes{};
  int64_t batch = 0;

  bool empty() const { return batch * sizes.positions * sizes.result == 0; }
  // A warp for each 32 positions, or for each of the blocks of 16 that tensor cores multiply.
  int threads() const {
    const int lanes = sizes.tensor_cores ? 2 * sizes.columns : (sizes.positions + 31) / 32 * 32;
    return std::min(kLayerThreads, std::max(64, lanes));
  }
};

// The state itself where one step leads from each position to the next one, else a copy.
Tensor with_steps(const Tensor& t) {
  if (t.dim() != 4 || t.size(2) <= 1 || t.size(3) <= 1 || t.stride(2) == t.size(3) * t.stride(3)) return t;
  return contiguous(t);
}

template <class Params>
Prepared prepare(Params& p, const std::vector<Tensor>& states, const Optional& skip_input,
                 const std::vector<Optional>& parameters, const std::string& kernel, const std::string& activation,
                 double tau, const std::string& input_activation, int64_t heads, bool residual) {
  Prepared r;
  DNL_CHECK(!states.empty() && states.size() <= kLayerMaxStates, "dnl_layer: CUDA takes 1 to ", kLayerMaxStates,
            " states, not ", states.size());
  const Tensor& first = states[0];
  LayerSizes& s = r.sizes;
  s.images = first.dim() == 4;
  DNL_CHECK(s.images || first.dim() == 3, "dnl_layer: states must be [B, C, H, W] or [B, N, C]");
  const int axis = s.images ? 1 : 2;
  auto positions = [&](const Tensor& t) { return s.images ? t.size(2) * t.size(3) : t.size(1); };
  r.batch = first.size(0);
  s.positions = static_cast<int>(positions(first));
  for (const Tensor& t : states) r.states.push_back(with_steps(t));
  if (skip_input) r.states.push_back(with_steps(*skip_input));
  s.count = static_cast<int>(r.states.size());
  p.first[0] = 0;
  for (int j = 0; j < s.count; j++) {
    const Tensor& t = r.states[j];
    DNL_CHECK(t.dim() == first.dim() && t.size(0) == r.batch && positions(t) == s.positions &&
                  t.scalar_type() == first.scalar_type() && t.device() == first.device(),
              "dnl_layer: states differ");
    const int64_t step = !s.images ? t.stride(1) : t.size(3) > 1 ? t.stride(3) : t.stride(2);
    p.states[j] = {t.data_ptr(), t.stride(0), t.stride(axis), step};
    p.first[j + 1] = p.first[j] + static_cast<int>(t.size(axis));
  }
  s.channels = p.first[states.size()];
  s.skip = p.first[s.count] - s.channels;
  for (int i = 0; i < kLayerParameters; i++) {
    p.parameters[i] = nullptr;
    if (!parameters[i]) continue;
    DNL_CHECK(parameters[i]->scalar_type() == first.scalar_type() && parameters[i]->device() == first.device(),
              "dnl_layer: parameter ", i, " differs from the states in element type or device");
    r.kept.push_back(contiguous(*parameters[i]));
    p.parameters[i] = r.kept.back().data_ptr();
  }
  s.kernel = kernel_of(kernel);
  s.width = static_cast<int>(parameters[kAffineWeight]->size(0));
  s.result = static_cast<int>(parameters[kOutputWeight]->size(0));
  s.heads = static_cast<int>(heads);
  s.query = static_cast<int>(parameters[kQueryWeight]->size(0) / heads);
  s.value = static_cast<int>(parameters[kValueWeight]->size(0) / heads);
  s.tensor_cores = first.element_size() == 2;
  const int unit = s.tensor_cores ? 16 : 4;
  s.query_padded = round_up(s.query, unit);
  s.value_padded = round_up(s.value, unit);
  DNL_CHECK(s.query_padded <= kLayerWidth && s.value_padded <= kLayerWidth, "dnl_layer: heads are wider than ",
            kLayerWidth);
  s.width_padded = s.tensor_cores ? round_up(s.width, unit) : s.width;
  s.result_padded = s.tensor_cores ? round_up(s.result, unit) : s.result;
  s.columns = round_up(s.positions, unit);
  s.stride = s.columns / 4 % 2 ? s.columns : s.columns + 4;
  s.input_activation = activation_of(input_activation);
  s.activation = activation_of(activation);
  s.tau = static_cast<float>(tau);
  s.residual = residual;
  auto numel = [&](int i, int64_t n) { return !parameters[i] || parameters[i]->numel() == n; };
  const int64_t queries = heads * s.query, values = heads * s.value;
  const int64_t expected[] = {s.width * s.channels, s.width, s.channels, s.channels, queries * s.width, queries,
                              queries * s.width, queries, values * s.width, values, s.result * values, s.result, heads,
                              s.result, s.result, s.width * s.skip, s.width};
  for (int i = 0; i < kLayerParameters; i++)
    DNL_CHECK(numel(i, expected[i]), "dnl_layer: parameter ", i, " has the wrong number of elements");
  DNL_CHECK((s.kernel == LayerKernel::gaussian) == !!parameters[kRho] &&
                !parameters[kRho] == !!parameters[kKeyWeight] &&
                skip_input.has_value() == parameters[kSkipWeight].has_value() && (!residual || s.result == s.width),
            "dnl_layer: parameters do not fit the kernel");
  return r;
}

bool wide(const Tensor& t, const Prepared& in) {
  return aligned(t.data_ptr()) && int64_t(in.sizes.result) * in.sizes.positions * t.element_size() % 16 == 0;
}

#define DNL_LAYER_ARGUMENTS                                                                                        \
  const std::vector<Tensor>&states, const Optional &skip_input, const Tensor &affine_weight,                        \
      const Optional &affine_bias, const Optional &norm_scale, const Optional &norm_shift, const Tensor &query_weight, \
      const Optional &query_bias, const Optional &key_weight, const Optional &key_bias, const Tensor &value_weight, \
      const Optional &value_bias, const Tensor &output_weight, const Optional &output_bias, const Optional &rho,     \
      const Optional &output_scale, const Optional &output_shift, const Optional &skip_weight,                      \
      const Optional &skip_bias, std::string kernel, std::string activation, double tau,                            \
      std::string input_activation, int64_t heads, bool residual
#define DNL_LAYER_PARAMETERS                                                                                       \
  std::vector<Optional> {                                                                                          \
    affine_weight, affine_bias, norm_scale, norm_shift, query_weight, query_bias, key_weight, key_bias, value_weight, \
        value_bias, output_weight, output_bias, rho, output_scale, output_shift, skip_weight, skip_bias            \
  }

Tensor dnl_layer_fwd(DNL_LAYER_ARGUMENTS) {
  LayerForward p;
  const Prepared in = prepare(p, states, skip_input, DNL_LAYER_PARAMETERS, kernel, activation, tau, input_activation,
                              heads, residual);
  const Tensor& first = states[0];
  Tensor out = in.sizes.images
                   ? torch::stable::new_empty(first, {in.batch, in.sizes.result, first.size(2), first.size(3)})
                   : torch::stable::new_empty(first, {in.batch, in.sizes.positions, in.sizes.result});
  if (in.empty()) return out;
  p.sizes = in.sizes;
  p.out = out.data_ptr();
  p.wide_out = wide(out, in);
  Launcher launch(out);
  dispatch_device("dnl_layer", out.scalar_type(), [&](auto zero) {
    launch("dnl_layer_fwd", dnl_layer_fwd_kernel<decltype(zero)>, dim3(in.batch), in.threads(),
           LayerLayout(in.sizes).total * sizeof(float), p);
  });
  return out;
}

std::tuple<std::vector<Tensor>, Tensor> dnl_layer_bwd(const Tensor& dout_in, DNL_LAYER_ARGUMENTS, bool need_states,
                                                      bool need_parameters) {
  LayerBackward p;
  const std::vector<Optional> parameters = DNL_LAYER_PARAMETERS;
  const Prepared in =
      prepare(p, states, skip_input, parameters, kernel, activation, tau, input_activation, heads, residual);
  const Tensor dout = contiguous(dout_in);
  DNL_CHECK(dout.numel() == in.batch * in.sizes.positions * in.sizes.result &&
                dout.scalar_type() == states[0].scalar_type() && dout.device() == states[0].device(),
            "dnl_layer: the output's gradient differs from the output");
  p.sizes = in.sizes;
  p.need_states = need_states;
  p.need_parameters = need_parameters;
  p.size = 0;
  for (int i = 0; i < kLayerParameters; i++) {
    p.offsets[i] = parameters[i] ? static_cast<int>(p.size) : -1;
    if (parameters[i]) p.size += parameters[i]->numel();
  }
  std::vector<Tensor> dstates;
  for (int j = 0; need_states && j < in.sizes.count; j++) {
    const Tensor& t = in.states[j];
    dstates.push_back(t.dim() == 4 ? torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)})
                                   : torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2)}));
    p.dstates[j] = dstates[j].data_ptr();
  }
  if (in.empty() || !(need_states || need_parameters)) {
    for (Tensor& t : dstates) torch::stable::zero_(t);  // no result, but perhaps states
    return {dstates, torch::stable::new_zeros(dout, {need_parameters ? p.size : 0})};
  }
  Tensor dparameters = torch::stable::new_empty(dout, {need_parameters ? p.size : 0});
  Tensor partial = torch::stable::new_empty(dout, {need_parameters ? in.batch * p.size : 0}, ScalarType::Float);
  p.dout = dout.data_ptr();
  p.partial = static_cast<float*>(partial.data_ptr());
  p.wide_dout = wide(dout, in);
  const LayerBackwardLayout layout(in.sizes, norm_scale || norm_shift, output_scale || output_shift);
  Launcher launch(dout);
  dispatch_device("dnl_layer", dout.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch("dnl_layer_bwd", dnl_layer_bwd_kernel<T>, dim3(in.batch), in.threads(), layout.total * sizeof(float), p);
    if (need_parameters)
      launch("sum_samples", sum_samples_kernel<T>, dim3((p.size + kLayerThreads - 1) / kLayerThreads), kLayerThreads, 0,
             static_cast<const float*>(p.partial), static_cast<T*>(dparameters.data_ptr()), in.batch, p.size);
  });
  return {dstates, dparameters};
}

}  // namespace
}  // namespace dnl

DNL_CUDA_LIBRARY(m) {
  m.impl("dnl_layer_fwd", TORCH_BOX(&dnl::dnl_layer_fwd));
  m.impl("dnl_layer_bwd", TORCH_BOX(&dnl::dnl_layer_bwd));
}
