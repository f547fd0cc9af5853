// nonlocal_attention on the CPU: checks -> params -> parallel loops. Meaning: ops/nonlocal_attention/reference.py.
#include <algorithm>
#include <array>
#include <cmath>

#include "common/parallel.h"
#include "nonlocal_attention/host.h"

namespace dnl {
namespace {

constexpr double kLargestLog = 12;  // of the normalisers that torch's backward may be given, see kLargeWidth

// [batch, heads, positions, features] whatever the layout.
NonlocalTensor view(const Tensor& t, bool channels_first) {
  const int position = channels_first ? 3 : 2, feature = channels_first ? 2 : 3;
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(position), t.stride(feature)};
}

struct Prepared {
  NonlocalParams params{};
  Tensor bandwidth, key_mask;
  std::vector<double> centre_and_radius;  // or floats
  std::vector<int64_t> key_count, key_index;
};

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

Tensor with_positions(const Tensor& like, int64_t positions, int64_t features, bool channels_first) {
  const int64_t B = like.size(0), h = like.size(1);
  if (channels_first) return empty(like, {B, h, features, positions}, like.scalar_type());
  return empty(like, {B, h, positions, features}, like.scalar_type());
}

void index_keys(Prepared& r, const Tensor& mask) {
  NonlocalParams& p = r.params;
  DNL_CHECK(mask.dim() == 2 && mask.size(0) == p.batch && mask.size(1) == p.keys && mask.scalar_type() == ScalarType::Bool,
            "nonlocal_attention: key_mask must be bool [B, M]");
  r.key_mask = torch::stable::contiguous(mask);
  const bool* allowed = static_cast<const bool*>(r.key_mask.const_data_ptr());
  r.key_count.assign(p.batch, 0);
  r.key_index.resize(p.batch * p.keys);
  for (int64_t b = 0; b < p.batch; b++)
    for (int64_t j = 0; j < p.keys; j++)
      if (allowed[b * p.keys + j]) r.key_index[b * p.keys + r.key_count[b]++] = j;
  p.key_count = r.key_count.data();
  p.key_index = r.key_index.data();
}

Prepared prepare(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bandwidth,
                 const std::optional<Tensor>& key_mask, double scale, bool normalize, bool causal, bool channels_first) {
  Prepared r;
  NonlocalParams& p = r.params;
  const ScalarType type = query.scalar_type();
  const int position = channels_first ? 3 : 2, feature = channels_first ? 2 : 3;
  for (const Tensor* t : {&query, &key, &value})
    DNL_CHECK(t->dim() == 4 && t->size(0) == query.size(0) && t->size(1) == query.size(1) && t->scalar_type() == type,
              "nonlocal_attention: query, key and value differ");
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(position);
  p.keys = key.size(position);
  p.width = query.size(feature);
  p.value_width = value.size(feature);
  DNL_CHECK(key.size(feature) == p.width && value.size(position) == p.keys, "nonlocal_attention: sizes do not match");
  p.storage = storage_of(type);
  p.query = view(query, channels_first);
  p.key = view(key, channels_first);
  p.value = view(value, channels_first);
  p.scale = scale;
  p.normalize = normalize;
  p.causal = causal;
  if (bandwidth) {
    DNL_CHECK(bandwidth->dim() == 1 && bandwidth->size(0) == p.heads, "nonlocal_attention: bandwidth must be [h]");
    r.bandwidth = torch::stable::contiguous(torch::stable::to(*bandwidth, ScalarType::Double));
    p.bandwidth = static_cast<const double*>(r.bandwidth.const_data_ptr());
  }
  if (key_mask) index_keys(r, *key_mask);
  const ScalarType compute = compute_type(query);
  const int64_t pairs = p.batch * p.heads, centres = centres_keys(p) ? pairs * p.width : 0;
  r.centre_and_radius.resize(centres + pairs);
  dispatch_float("nonlocal_attention", compute, [&](auto zero) {
    using T = decltype(zero);
    T* const found = reinterpret_cast<T*>(r.centre_and_radius.data());
    p.centre = centres ? found : nullptr;
    p.radius = found + centres;
    prepare_keys<T>(p, 0, pairs);
  });
  return r;
}

std::tuple<Tensor, Tensor, Tensor> nonlocal_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                          const std::optional<Tensor>& bandwidth,
                                                          const std::optional<Tensor>& key_mask, double scale,
                                                          bool normalize, bool causal, bool channels_first) {
  Prepared in = prepare(query, key, value, bandwidth, key_mask, scale, normalize, causal, channels_first);
  NonlocalParams& p = in.params;
  const ScalarType compute = compute_type(query);
  Tensor output = with_positions(query, p.queries, p.value_width, channels_first);
  Tensor shift = empty(query, {p.batch, p.heads, p.queries}, compute);
  Tensor sum = empty(query, {p.batch, p.heads, p.queries}, compute);
  p.output = view(output, channels_first);
  p.shift = shift.data_ptr();
  p.sum = sum.data_ptr();
  dispatch_float("nonlocal_attention", compute, [&](auto zero) {
    attend<decltype(zero)>(p, 0, p.batch * p.heads);
  });
  return {output, shift, sum};
}

// The rows' natural log-normalisers, or nothing where one is too large, a row has a shift (its exponents have no bound, see
// tiles.h) or a number is not finite.
std::optional<Tensor> log_normalisers(const Tensor& shift, const Tensor& sum) {
  Tensor result = torch::stable::new_empty(shift, {shift.size(0), shift.size(1), shift.size(2)});
  const float *s = static_cast<const float*>(shift.const_data_ptr()), *z = static_cast<const float*>(sum.const_data_ptr());
  float* to = static_cast<float*>(result.data_ptr());
  bool usable = true;
  for (int64_t i = 0; i < shift.numel(); i++) {
    to[i] = static_cast<float>(std::log(double(z[i])));
    usable = usable && s[i] == 0 && std::abs(to[i]) <= kLargestLog;
  }
  return usable ? std::optional<Tensor>(result) : std::nullopt;
}

// dquery, dkey and dvalue by torch, for the calls that its kernel takes as they are and computes faster.
std::optional<std::tuple<Tensor, Tensor, Tensor>> large_backward(const Tensor& doutput, const Tensor& query,
                                                                 const Tensor& key, const Tensor& value,
                                                                 const Tensor& output, const Tensor& shift,
                                                                 const Tensor& sum, double scale) {
  for (const Tensor* t : {&doutput, &query, &key, &value, &output})
    if (t->dim() != 4 || t->stride(3) != 1 || t->scalar_type() != ScalarType::Float) return std::nullopt;
  // What does not fit together is for the checks of the other path.
  const bool fits = same_sizes(key, value) && same_sizes(query, output) && same_sizes(query, doutput) &&
                    key.size(0) == query.size(0) && key.size(1) == query.size(1) && key.size(3) == query.size(3);
  if (!fits || query.size(3) < kLargeWidth || query.numel() == 0 || key.numel() == 0) return std::nullopt;
  for (const Tensor* t : {&shift, &sum})
    if (t->dim() != 3 || t->numel() * query.size(3) != query.numel() || t->scalar_type() != ScalarType::Float ||
        !t->is_contiguous())
      return std::nullopt;
  const std::optional<Tensor> log_sum = log_normalisers(shift, sum);
  if (!log_sum) return std::nullopt;
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 10> stack{from(doutput), from(query), from(key), from(value), from(output), from(*log_sum),
                                     from(0.0), from(false), from(std::nullopt), from(std::optional<double>(scale))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "",
                                               stack.data(), TORCH_ABI_VERSION));
  return std::make_tuple(to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nonlocal_attention_bwd(
    const Tensor& doutput, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& bandwidth, const std::optional<Tensor>& key_mask, const Tensor& output,
    const Tensor& shift, const Tensor& sum, double scale, bool normalize, bool causal, bool channels_first,
    bool need_bandwidth) {
  const int position = channels_first ? 3 : 2, feature = channels_first ? 2 : 3;
  if (!bandwidth && !key_mask && normalize && !causal && !channels_first)
    if (auto found = large_backward(doutput, query, key, value, output, shift, sum, scale)) {
      const auto& [dquery, dkey, dvalue] = *found;
      return {torch::stable::contiguous(dquery), torch::stable::contiguous(dkey), torch::stable::contiguous(dvalue),
              empty(query, {0}, compute_type(query))};
    }
  Prepared in = prepare(query, key, value, bandwidth, key_mask, scale, normalize, causal, channels_first);
  NonlocalParams& p = in.params;
  const ScalarType compute = compute_type(query);
  const std::vector<int64_t> rows{p.batch, p.heads, p.queries};
  DNL_CHECK(same_sizes(doutput, output) && doutput.scalar_type() == query.scalar_type() &&
                output.scalar_type() == query.scalar_type() && doutput.dim() == 4 &&
                doutput.size(0) == p.batch && doutput.size(1) == p.heads &&
                doutput.size(channels_first ? 3 : 2) == p.queries && doutput.size(channels_first ? 2 : 3) == p.value_width,
            "nonlocal_attention: doutput or output differ from what the forward returned");
  for (const Tensor* t : {&shift, &sum})
    DNL_CHECK(t->dim() == 3 && t->numel() == p.batch * p.heads * p.queries && t->scalar_type() == compute &&
                  t->is_contiguous(),
              "nonlocal_attention: shift or sum differ from what the forward returned");
  const auto like = [&](const Tensor& t) {
    return with_positions(query, t.size(position), t.size(feature), channels_first);
  };
  Tensor dquery = like(query), dkey = like(key), dvalue = like(value);
  if (key_mask) {  // masked keys are never visited
    torch::stable::zero_(dkey);
    torch::stable::zero_(dvalue);
  }
  p.output = view(output, channels_first);
  p.doutput = view(doutput, channels_first);
  p.dquery = view(dquery, channels_first);
  p.dkey = view(dkey, channels_first);
  p.dvalue = view(dvalue, channels_first);
  p.shift = const_cast<void*>(shift.const_data_ptr());
  p.sum = const_cast<void*>(sum.const_data_ptr());
  cut_keys(p);
  const int64_t samples = p.batch * p.heads;
  Tensor moments = empty(query, {need_bandwidth ? p.parts * samples * p.queries * 3 : 0}, compute);
  p.moments = need_bandwidth ? moments.data_ptr() : nullptr;
  Tensor parts = empty(query, {p.parts > 1 ? p.parts * samples * p.queries * p.width : 0}, compute);
  p.dquery_parts = parts.data_ptr();
  Tensor anchor = empty(query, {0}, query.scalar_type());
  dispatch_float("nonlocal_attention", compute, [&](auto zero) {
    using T = decltype(zero);
    if (needs_anchor<T>(p, 0, samples)) {
      anchor = with_positions(query, p.queries, p.width, channels_first);
      find_anchor<T>(p, view(anchor, channels_first), 0, samples);
    }
    attend_back<T>(p, 0, samples);
  });
  Tensor dbandwidth = empty(query, {need_bandwidth ? p.heads : 0}, ScalarType::Double);
  if (need_bandwidth)
    dispatch_float("nonlocal_attention", compute, [&](auto zero) {
      using T = decltype(zero);
      reduce_moments(p, static_cast<const T*>(moments.const_data_ptr()), static_cast<double*>(dbandwidth.data_ptr()));
    });
  return {dquery, dkey, dvalue, narrowed(dbandwidth, compute)};
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("nonlocal_attention_fwd", TORCH_BOX(&dnl::nonlocal_attention_fwd));
  m.impl("nonlocal_attention_bwd", TORCH_BOX(&dnl::nonlocal_attention_bwd));
}
