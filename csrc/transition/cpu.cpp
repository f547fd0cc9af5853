// What stands around the blocks of an evaluated DenseNet: its transitions, the pooling behind its stem, and that in front
// of its classifier. Meaning: dnl_kernels/ops/transition/reference.py.
#include "common/conv_host.h"
#include "common/folded.h"
#include "transition/params.h"

namespace dnl {
namespace {

struct Places {  // of the packed numbers
  int64_t scale, shift, weight, bias, size, padded;

  Places(int64_t channels, int64_t outputs) : padded(round_up(outputs, kTransitionBlock)) {
    scale = 0;
    shift = round_up(channels, kTransitionBlock);
    weight = 2 * shift;
    bias = weight + padded * channels;
    size = bias + padded;
  }
};

Tensor transition_pack(const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                       const std::vector<std::optional<Tensor>>& norm, double eps) {
  DNL_CHECK(weight_in.dim() >= 2 && norm.size() == 4, "transition: weight [D, C, 1, 1]; gamma, beta, mean, var");
  const Tensor weight = widened(weight_in);
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  DNL_CHECK(weight.numel() == outputs * channels, "transition: weight [D, C, 1, 1]");
  const Places at(channels, outputs);
  const Folded folded(true, eps, channels, norm.data());
  const std::vector<double> bias = vector_of(bias_in, outputs, 0);
  Tensor packed = torch::stable::new_empty(weight, {at.size});
  dispatch_float("transition", packed.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(packed.data_ptr());
    const T* w = static_cast<const T*>(weight.data_ptr());
    std::fill(to, to + at.size, T(0));
    for (int64_t c = 0; c < channels; c++) {
      to[at.scale + c] = static_cast<T>(folded.scale[c]);
      to[at.shift + c] = static_cast<T>(folded.shift[c]);
    }
    constexpr int64_t n = kTransitionBlock;
    for (int64_t o = 0; o < outputs; o++) {
      for (int64_t c = 0; c < channels; c++)
        to[at.weight + (o / n * channels + c) * n + o % n] = w[o * channels + c];
      to[at.bias + o] = static_cast<T>(bias[o]);
    }
  });
  return packed;
}

Tensor transition_eval(const Tensor& x_in, const Tensor& packed, int64_t outputs, const std::string& activation,
                       bool pool) {
  DNL_CHECK(x_in.dim() == 4, "transition: x");
  const Tensor x = with_dense_planes(x_in);
  const Places at(x.size(1), outputs);
  DNL_CHECK(packed.scalar_type() == x.scalar_type() && packed.is_contiguous() && packed.numel() == at.size,
            "transition: packed weights of another one");
  const int64_t by = pool ? 2 : 1;
  Tensor y = in_large_pages(torch::stable::new_empty(x, {x.size(0), outputs, x.size(2) / by, x.size(3) / by}));
  const Activation act = activation_of(activation);
  dispatch_float("transition", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* p = static_cast<const T*>(packed.data_ptr());
    const Transition<T> t{static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1), x.size(1), x.size(2), x.size(3),
                          pool, p + at.scale, p + at.shift, p + at.weight, p + at.bias, outputs, at.padded,
                          static_cast<T*>(y.data_ptr()), act};
    const int64_t pixels = x.size(0) * t.rows() * t.columns();
    if (pixels == 0 || outputs == 0) return;
    const int64_t tasks = pieces_of(pixels, kTransitionPanel, 12, free_threads());
    constexpr int64_t panel = (kTransitionDepth + 1) * kTransitionPanel;
    const int64_t products = (kTransitionPanel + kTransitionBlock) * at.padded;
    parallel_tasks(0, tasks, 1, [&](int64_t i, int64_t) {
      Scratch scratch(Scratch::bytes<T>(panel) + Scratch::bytes<T>(products));
      T* const first = scratch.take<T>(panel);
      const int64_t begin = i * pixels / tasks, end = (i + 1) * pixels / tasks;
      DNL_ISA_CALL(transition_pixels<T>(t, begin, end - begin, first, scratch.take<T>(products)));
    });
  });
  return narrowed(y, x_in.scalar_type());
}

// x with dense planes, and that scale and shift belong to it
Tensor checked(const Tensor& x_in, const Tensor& scale, const Tensor& shift) {
  DNL_CHECK(x_in.dim() == 4, "norm_activation: x");
  const Tensor x = with_dense_planes(x_in);
  for (const Tensor* t : {&scale, &shift})
    DNL_CHECK(t->numel() == x.size(1) && t->scalar_type() == x.scalar_type() && t->is_contiguous(),
              "norm_activation: vector");
  return x;
}

// maxima over 3 x 3 pixels, 2 apart, of act(scale * x + shift), the image's edge left out
Tensor norm_activation_max_pool(const Tensor& x_in, const Tensor& scale, const Tensor& shift,
                                const std::string& activation) {
  const Tensor x = checked(x_in, scale, shift);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  Tensor y = torch::stable::new_empty(x, {x.size(0), channels, (height + 1) / 2, (width + 1) / 2});
  const Activation act = activation_of(activation);
  dispatch_float("norm_activation", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Planes<const T> from = planes_of<const T>(x);
    const Planes<T> to = planes_of<T>(y);
    const int64_t planes = y.numel() ? x.size(0) * channels : 0;
    parallel_tasks(0, planes, grain_for(planes), [&](int64_t begin, int64_t end) {
      const int64_t size = width + 5 * kTransitionBlock;  // a block in front, the last one full, two behind, one to spare
      Scratch scratch(Scratch::bytes<T>(size));
      T* const row = scratch.take<T>(size);
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / channels, c = i % channels;
        DNL_ISA_CALL(max_pool_plane<T>(at(from, b, c).data, height, width, static_cast<const T*>(scale.data_ptr())[c],
                                       static_cast<const T*>(shift.data_ptr())[c], act, row, at(to, b, c).data));
      }
    });
  });
  return narrowed(y, x_in.scalar_type());
}

// [batch, channels]: the mean of act(scale * x + shift) over each plane
Tensor norm_activation_mean(const Tensor& x_in, const Tensor& scale, const Tensor& shift, const std::string& activation) {
  const Tensor x = checked(x_in, scale, shift);
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3), planes = x.size(0) * channels;
  Tensor y = torch::stable::new_empty(x, {x.size(0), channels});
  const Activation act = activation_of(activation);
  dispatch_float("norm_activation", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Planes<const T> from = planes_of<const T>(x);
    T* const to = static_cast<T*>(y.data_ptr());
    const T *s = static_cast<const T*>(scale.data_ptr()), *h = static_cast<const T*>(shift.data_ptr());
    parallel_tasks(0, planes, grain_for(planes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t c = i % channels;
        DNL_ISA_CALL(mean_plane<T>(at(from, i / channels, c).data, pixels, s[c], h[c], act, to + i));
      }
    });
  });
  return narrowed(y, x_in.scalar_type());
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("transition_pack", TORCH_BOX(&dnl::transition_pack));
  m.impl("transition_eval", TORCH_BOX(&dnl::transition_eval));
  m.impl("norm_activation_max_pool", TORCH_BOX(&dnl::norm_activation_max_pool));
  m.impl("norm_activation_mean", TORCH_BOX(&dnl::norm_activation_mean));
}
