// Batch normalisation with the activation after it, and the average pooling after that, in one pass over memory each:
// statistics, the result, its gradient, and what is left of it once the statistics have been differentiated. For
// dnl_kernels/ops/norm_activation and the blocks around torch's products (dnl_kernels/ops/dnl_block/prefix.py). Tensors
// are [B, C, H, W] with dense planes and any strides between them; vectors are [C].
#include <algorithm>

#include "common/conv_host.h"

namespace dnl {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task

struct Shape {
  int64_t batch, channels, height, width, pixels;
};

// Checked against each other: planes as the loops read and write them, vectors of one number per channel.
Shape shape_of(const Tensor& x, std::initializer_list<const Tensor*> planes,
               std::initializer_list<const Tensor*> vectors) {
  DNL_CHECK(x.dim() == 4 && has_dense_planes(x), "norm_activation: x");
  for (const Tensor* t : planes)
    DNL_CHECK(same_sizes(*t, x) && t->scalar_type() == x.scalar_type() && has_dense_planes(*t),
              "norm_activation: planes");
  for (const Tensor* t : vectors)
    DNL_CHECK(t->numel() == x.size(1) && t->scalar_type() == x.scalar_type() && t->is_contiguous(),
              "norm_activation: vector");
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(2) * x.size(3)};
}

// Checked likewise: the result, in planes of the size that pooling leaves, whichever way an odd side is rounded.
void check_pooled(const Tensor& x, const Tensor& t, bool pool) {
  DNL_CHECK(t.dim() == 4 && t.scalar_type() == x.scalar_type() && has_dense_planes(t), "norm_activation: planes");
  for (int64_t d = 0; d < 4; d++)
    DNL_CHECK(pool && d > 1 ? t.size(d) == x.size(d) / 2 || t.size(d) == (x.size(d) + 1) / 2 : t.size(d) == x.size(d),
              "norm_activation: pooled planes");
}

// Runs body(channel) for all channels, in parallel: a channel's sums depend on no thread count.
template <class Body>
void for_each_channel(const Shape& s, Body body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.batch * s.pixels));
  parallel_tasks(0, s.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) body(c);
  });
}

std::tuple<Tensor, Tensor> norm_activation_moments(const Tensor& x) {
  const Shape s = shape_of(x, {}, {});
  Tensor mean = torch::stable::new_empty(x, {s.channels}), var = torch::stable::new_empty(x, {s.channels});
  dispatch_float("norm_activation", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Planes<const T> from = planes_of<const T>(x);
    for_each_channel(s, [&](int64_t c) {
      double count = 0, middle = 0, deviations = 0;
      for (int64_t b = 0; b < s.batch; b++) {
        double m, d;
        DNL_ISA_CALL(moments<T>(at(from, b, c).data, s.pixels, &m, &d));
        const double n = static_cast<double>(s.pixels), total = count + n, delta = m - middle;
        if (n == 0) continue;
        deviations += d + delta * delta * count * n / total;
        middle += delta * n / total;
        count = total;
      }
      elements_of<T>(mean)[c] = static_cast<T>(middle);
      elements_of<T>(var)[c] = static_cast<T>(count > 0 ? deviations / count : 0.0);
    });
  });
  return {mean, var};
}

// out = act(scale * x + shift), or the means of its 2 x 2 pixels
void norm_activation_fwd(const Tensor& x, const Tensor& scale, const Tensor& shift, std::string activation, Tensor out,
                         bool pool) {
  const Shape s = shape_of(x, {}, {&scale, &shift});
  check_pooled(x, out, pool);
  const Activation act = activation_of(activation);
  dispatch_float("norm_activation", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Planes<const T> from = planes_of<const T>(x);
    const Planes<T> to = planes_of<T>(out);
    for_each_channel(s, [&](int64_t c) {
      Scratch scratch(Scratch::bytes<T>(pool ? s.pixels : 0));
      T* const plane = scratch.take<T>(pool ? s.pixels : 0);
      for (int64_t b = 0; b < s.batch; b++) {
        T* const result = at(to, b, c).data;
        DNL_ISA_CALL(activate_run<T>(at(from, b, c).data, s.pixels, elements_of<const T>(scale)[c], elements_of<const T>(shift)[c],
                                     static_cast<const T*>(nullptr), act, pool ? plane : result,
                                     static_cast<T*>(nullptr)));
        if (pool) DNL_ISA_CALL(pool_plane<T>(plane, s.height, s.width, out.size(2), out.size(3), result));
      }
    });
  });
}

// g = dz * act'(scale * x + shift), dz of every pixel's share where it is pooled: total (+)= scale * g; returns sum g and
// sum g * (x - mean) of every channel.
std::tuple<Tensor, Tensor> norm_activation_pull(const Tensor& dz, const Tensor& x, const Tensor& scale,
                                                const Tensor& shift, const Tensor& mean, std::string activation,
                                                bool accumulate, Tensor total, bool pool) {
  const Shape s = shape_of(x, {&total}, {&scale, &shift, &mean});
  check_pooled(x, dz, pool);
  const Activation act = activation_of(activation);
  Tensor plain = torch::stable::new_empty(x, {s.channels}), moment = torch::stable::new_empty(x, {s.channels});
  dispatch_float("norm_activation", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Planes<const T> from = planes_of<const T>(x), gradient = planes_of<const T>(dz);
    const Planes<T> to = planes_of<T>(total);
    for_each_channel(s, [&](int64_t c) {
      double sums[2] = {};
      Scratch scratch(Scratch::bytes<T>(pool ? s.pixels : 0));
      T* const plane = scratch.take<T>(pool ? s.pixels : 0);
      for (int64_t b = 0; b < s.batch; b++) {
        const T* g = at(gradient, b, c).data;
        if (pool) {
          DNL_ISA_CALL(unpool_plane<T>(g, s.height, s.width, dz.size(2), dz.size(3), plane));
          g = plane;
        }
        DNL_ISA_CALL(activate_back_run<T>(g, at(from, b, c).data, s.pixels, elements_of<const T>(scale)[c], elements_of<const T>(shift)[c],
                                          elements_of<const T>(mean)[c], act, accumulate, at(to, b, c).data, sums));
      }
      elements_of<T>(plain)[c] = static_cast<T>(sums[0]);
      elements_of<T>(moment)[c] = static_cast<T>(sums[1]);
    });
  });
  return {plain, moment};
}

// total += rate * (x - mean) + constant
void norm_activation_correct(const Tensor& x, const Tensor& rate, const Tensor& mean, const Tensor& constant,
                            Tensor total) {
  const Shape s = shape_of(x, {&total}, {&rate, &mean, &constant});
  dispatch_float("norm_activation", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Planes<const T> from = planes_of<const T>(x);
    const Planes<T> to = planes_of<T>(total);
    for_each_channel(s, [&](int64_t c) {
      for (int64_t b = 0; b < s.batch; b++)
        DNL_ISA_CALL(correct_run<T>(at(from, b, c).data, s.pixels, elements_of<const T>(rate)[c], elements_of<const T>(mean)[c],
                                    elements_of<const T>(constant)[c], at(to, b, c).data));
    });
  });
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("norm_activation_moments", TORCH_BOX(&dnl::norm_activation_moments));
  m.impl("norm_activation_fwd", TORCH_BOX(&dnl::norm_activation_fwd));
  m.impl("norm_activation_pull", TORCH_BOX(&dnl::norm_activation_pull));
  m.impl("norm_activation_correct", TORCH_BOX(&dnl::norm_activation_correct));
}
