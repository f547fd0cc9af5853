// dense_sum on the CPU: checks -> params -> parallel loops. Meaning: dnl_kernels/ops/dense_sum/reference.py.
#include <algorithm>

#include "common/parallel.h"
#include "dense_sum/params.h"

namespace dnl {
namespace {

constexpr int64_t kGrain = 16384;    // elements per task, where each is on its own
constexpr int64_t kChunks = 64;      // weight-gradient partial sums: fixed, so that results do not depend on threads

// Contiguous copies where needed, and the sizes [outer, channels, inner] that the kernels see.
struct Prepared {
  std::vector<Tensor> tensors;
  std::vector<const void*> pointers;
  Tensor weight;
  DenseSumParams params;
};

// several: the weight has one more dimension in front, the sums.
Prepared prepare(const std::vector<Tensor>& states, const Tensor& weight, int64_t channel_dim, bool several = false) {
  DNL_CHECK(!states.empty(), "dense_sum: states is empty");
  const Tensor& first = states[0];
  Prepared r{{}, {}, widened(weight), {}};
  for (const Tensor& state : states) {
    DNL_CHECK(same_sizes(state, first) && state.scalar_type() == first.scalar_type(), "dense_sum: states differ");
    r.tensors.push_back(widened(state));
    r.pointers.push_back(r.tensors.back().const_data_ptr());
  }
  DNL_CHECK(weight.scalar_type() == first.scalar_type(), "dense_sum: weight's element type differs");
  const int64_t count = states.size();
  DenseSumParams& p = r.params;
  p.states = r.pointers.data();
  p.weight = r.weight.const_data_ptr();
  p.count = count;
  p.outer = p.inner = p.channels = 1;
  if (weight.dim() == 2 + several) {
    DNL_CHECK(channel_dim >= 0 && channel_dim < first.dim(), "dense_sum: channel_dim out of range");
    for (int64_t d = 0; d < channel_dim; d++) p.outer *= first.size(d);
    for (int64_t d = channel_dim + 1; d < first.dim(); d++) p.inner *= first.size(d);
    p.channels = first.size(channel_dim);
  } else {
    p.inner = first.numel();
  }
  DNL_CHECK(weight.numel() == (several ? weight.size(0) : 1) * count * p.channels, "dense_sum: weight has the wrong number of elements");
  return r;
}

void add(const Prepared& in, const std::vector<Tensor>& sums, bool accumulate) {
  dispatch_float("dense_sum", sums[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t targets = sums.size();
    DenseSumParams p = in.params;
    std::vector<T*> out;
    for (const Tensor& t : sums) out.push_back(static_cast<T*>(t.data_ptr()));
    for (int64_t first = 0; first < targets; first += kDenseSumTargets) {
      const int64_t n = std::min(kDenseSumTargets, targets - first);
      p.weight = static_cast<const T*>(in.params.weight) + first * p.count * p.channels;
      parallel_tasks(0, sums[0].numel(), kGrain, [&](int64_t begin, int64_t end) {
        DNL_ISA_CALL(dense_sum_add<T>(p, out.data() + first, n, accumulate, begin, end));
      });
    }
  });
}

Tensor dense_sum_fwd(const std::vector<Tensor>& states, const Tensor& weight, int64_t channel_dim) {
  const Prepared in = prepare(states, weight, channel_dim);
  Tensor y = in_large_pages(torch::stable::empty_like(in.tensors[0]));
  add(in, {y}, false);
  return narrowed(y, states[0].scalar_type());
}

void dense_sum_add(const std::vector<Tensor>& sums, const std::vector<Tensor>& states, const Tensor& weight,
                   bool accumulate, int64_t channel_dim) {
  const Prepared in = prepare(states, weight, channel_dim, true);
  DNL_CHECK(weight.dim() > 1 && static_cast<int64_t>(sums.size()) == weight.size(0), "dense_sum: a sum for each row");
  for (const Tensor& t : sums)
    DNL_CHECK(same_sizes(t, states[0]) && t.is_contiguous() && t.scalar_type() == in.weight.scalar_type(),
              "dense_sum: sums are contiguous and as wide as they accumulate");
  if (!sums.empty()) add(in, sums, accumulate);
}

std::tuple<std::vector<Tensor>, Tensor> dense_sum_bwd(const Tensor& dy_in, const std::vector<Tensor>& states,
                                                      const Tensor& weight, int64_t channel_dim, bool need_states,
                                                      bool need_weight) {
  Prepared in = prepare(states, weight, channel_dim);
  DNL_CHECK(same_sizes(dy_in, states[0]), "dense_sum: dy differs from the states in size");
  Tensor dy = widened(dy_in);
  std::vector<Tensor> dstates;
  for (size_t j = 0; need_states && j < states.size(); j++) dstates.push_back(in_large_pages(torch::stable::empty_like(dy)));
  Tensor dweight = torch::stable::new_zeros(in.weight, {need_weight ? in.params.count : 0, in.params.channels});
  dispatch_float("dense_sum", dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* grad = elements_of<const T>(dy);
    const int64_t n = dy.numel(), rows = in.params.count * in.params.channels;
    if (need_states) {
      std::vector<T*> out;
      for (Tensor& d : dstates) out.push_back(static_cast<T*>(d.data_ptr()));
      parallel_tasks(0, n, kGrain, [&](int64_t begin, int64_t end) {
        DNL_ISA_CALL(dense_sum_bwd_states<T>(in.params, grad, out.data(), begin, end));
      });
    }
    if (need_weight) {
      const int64_t chunk = (n + kChunks - 1) / kChunks;
      std::vector<T> partial(rows * kChunks, T(0));
      parallel_tasks(0, kChunks, 1, [&](int64_t c, int64_t) {
        const int64_t begin = c * chunk, end = begin + chunk < n ? begin + chunk : n;
        if (begin < end) DNL_ISA_CALL(dense_sum_bwd_weight<T>(in.params, grad, &partial[c * rows], begin, end));
      });
      T* out = static_cast<T*>(dweight.data_ptr());
      for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int64_t c = 0; c < kChunks; c++) sum += partial[c * rows + r];
        out[r] = static_cast<T>(sum);
      }
    }
  });
  if (weight.dim() == 1) dweight = torch::stable::flatten(dweight);
  for (Tensor& d : dstates) d = narrowed(d, weight.scalar_type());
  return {dstates, narrowed(dweight, weight.scalar_type())};
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("dense_sum_fwd", TORCH_BOX(&dnl::dense_sum_fwd));
  m.impl("dense_sum_add", TORCH_BOX(&dnl::dense_sum_add));
  m.impl("dense_sum_bwd", TORCH_BOX(&dnl::dense_sum_bwd));
}
