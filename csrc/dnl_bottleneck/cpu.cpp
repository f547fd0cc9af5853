// A bottleneck block (DenseNet-BC), evaluated or trained, in one parallel region. For evaluation dnl_bottleneck_pack folds
// the normalisations into the layers' weights and transforms the filters, and dnl_bottleneck_eval runs all layers. Meaning:
// dnl_kernels/ops/dnl_block/reference.py; the steps of a layer are explained in params.h.
#include <algorithm>
#include <cmath>

#include "dnl_bottleneck/block.h"
#include "dnl_bottleneck/backward.h"
#include "dnl_bottleneck/training.h"

namespace dnl {
namespace {

template <class T>
void pack_layer(const Block& block, const Layout& l, const Tensor& weight, const Tensor& filters, double tau,
                const Folded& outer, const Folded& inner, const std::vector<double>& bias, T* packed) {
  constexpr int64_t n = kBottleneckBlock;
  std::fill(packed + l.scale, packed + l.filters, T(0));
  for (int64_t c = 0; c < l.channels; c++) {
    packed[l.scale + c] = static_cast<T>(outer.scale[c]);
    packed[l.shift + c] = static_cast<T>(outer.shift[c]);
  }
  const T* w = static_cast<const T*>(weight.data_ptr());
  for (int64_t o = 0; o < block.wide; o++) {
    T* to = packed + l.weight + o / n * n * l.channels + o % n;
    for (int64_t c = 0; c < l.channels; c++)
      to[c * n] = static_cast<T>(inner.scale[o] * tau * double(w[o * l.channels + c]));
    packed[l.bias + o] = static_cast<T>(inner.scale[o] * bias[o] + inner.shift[o]);
  }
  DNL_ISA_CALL(pack_winograd<T>(static_cast<const T*>(filters.data_ptr()), block.growth, block.wide, false, 0,
                                block.padded_growth / n, block.padded_growth, block.padded_wide, packed + l.filters));
}

Tensor dnl_bottleneck_pack(const Tensors& tensors, const std::vector<int64_t>& connectivity, int64_t in_channels,
                           int64_t growth, int64_t bottleneck, bool norm, double tau, double eps) {
  const Block block(in_channels, growth, bottleneck, connectivity);
  const int64_t layers = block.layers.size();
  DNL_CHECK(layers > 0 && int64_t(tensors.size()) == kNames * layers, "dnl_bottleneck: tensors of every layer");
  std::vector<Tensor> weights, filters;
  std::vector<Folded> outer, inner;
  std::vector<std::vector<double>> biases;
  for (int64_t l = 0; l < layers; l++) {
    const std::optional<Tensor>* t = tensors.data() + l * kNames;
    const int64_t channels = block.layers[l].channels;
    DNL_CHECK(t[kWeight].has_value() && t[kInnerWeight].has_value(), "dnl_bottleneck: weights");
    weights.push_back(widened(*t[kWeight]));
    filters.push_back(widened(*t[kInnerWeight]));
    DNL_CHECK(weights[l].numel() == block.wide * channels && filters[l].numel() == growth * block.wide * 9 &&
                  weights[l].scalar_type() == weights[0].scalar_type() &&
                  filters[l].scalar_type() == weights[0].scalar_type(),
              "dnl_bottleneck: shape or type of a weight");
    outer.emplace_back(norm, eps, channels, t + kGamma);
    inner.emplace_back(norm, eps, block.wide, t + kInnerGamma);
    biases.push_back(vector_of(t[kBias], block.wide, 0));
  }
  Tensor packed = in_large_pages(torch::stable::new_empty(weights[0], {block.packed}));
  dispatch_float("dnl_bottleneck", packed.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_tasks(0, layers, 1, [&](int64_t l, int64_t) {
      pack_layer<T>(block, block.layers[l], weights[l], filters[l], tau, outer[l], inner[l], biases[l],
                    static_cast<T*>(packed.data_ptr()));
    });
  });
  return packed;
}

constexpr int64_t kMapsBytes = 2 << 20;  // of z: images that are computed together stay in the second cache

// The steps of a block: copy x0 and zero the borders of z, then for each group of images two steps for each layer.
template <class T>
class Evaluation {
 public:
  Evaluation(const Block& block, const Tensor& x0, const T* packed, Activation activation, T* states)
      : block_(block), x0_(planes_of<const T>(x0)), states_(states), batch_(x0.size(0)) {
    maps_ = {1, x0.size(2), x0.size(3), block.channels() * x0.size(2) * x0.size(3), block.padded_wide,
             block.padded_growth};
    const int64_t bytes = maps_.image() * sizeof(T);
    const int64_t together = std::max<int64_t>(1, std::min<int64_t>(batch_, kMapsBytes / bytes));
    groups_ = (batch_ + together - 1) / together;
    largest_ = (batch_ + groups_ - 1) / groups_;
    for (size_t i = 0; i < block.layers.size(); i++) {
      const Layout& l = block.layers[i];
      layers_.push_back({l.spans.data(), l.channels, packed + l.scale, packed + l.shift, packed + l.weight,
                         packed + l.bias, packed + l.filters, block.growth, block.channel_of(i), activation});
    }
  }
  int64_t z_size() const { return largest_ * maps_.image(); }

  void run(T* z) {
    z_ = z;
    threads_ = free_threads();
    const auto prepare = [&] { return ForwardScratch<T>(maps_); };
    const int64_t layers = layers_.size();
    const auto count = [&](int64_t phase) {
      if (phase == 0) return block_.in_channels * batch_ + largest_;
      const BottleneckMaps maps = group((phase - 1) / (2 * layers)).maps;
      const Split s = split(maps);
      return phase % 2 ? s.panels * s.blocks : s.tiles;
    };
    parallel_phases(1 + 2 * layers * groups_, prepare, count, [&](int64_t phase, int64_t task, ForwardScratch<T>& own) {
      if (phase == 0) return start(task);
      const Group g = group((phase - 1) / (2 * layers));
      const BottleneckLayer<T>& layer = layers_[(phase - 1) / 2 % layers];
      const Split s = split(g.maps);
      const auto share = [](int64_t i, int64_t pieces, int64_t count) { return i * count / pieces; };
      if (phase % 2) {
        const int64_t n = g.maps.batch * g.maps.pixels(), panel = task / s.blocks, part = task % s.blocks;
        const int64_t first = share(panel, s.panels, n), end = share(panel + 1, s.panels, n);
        const int64_t blocks = maps_.wide / kBottleneckBlock;
        DNL_ISA_CALL(bottleneck_expand<T>(g.maps, layer, g.states, first, end - first, share(part, s.blocks, blocks),
                                          share(part + 1, s.blocks, blocks), own.panel, z_));
      } else {
        const int64_t n = g.maps.tiles(), first = share(task, s.tiles, n), end = share(task + 1, s.tiles, n);
        DNL_ISA_CALL(bottleneck_contract<T>(g.maps, layer, z_, first, end - first, own.transformed, own.products,
                                            own.pixels, g.states));
      }
    });
  }

 private:
  struct Group {
    BottleneckMaps maps;
    T* states;
  };
  struct Split {
    int64_t panels, blocks, tiles;  // tasks: pixels x blocks of outputs, tiles
  };

  Group group(int64_t i) const {
    const int64_t first = i * batch_ / groups_;
    Group g{maps_, states_ + first * maps_.image_stride};
    g.maps.batch = (i + 1) * batch_ / groups_ - first;
    return g;
  }
  Split split(const BottleneckMaps& maps) const {
    const int64_t pixels = maps.batch * maps.pixels(), blocks = maps.wide / kBottleneckBlock;
    Split s{pieces_of(pixels, kBottleneckPanel, 12, threads_), 1, pieces_of(maps.tiles(), kBottleneckTiles, 4, threads_)};
    if (s.panels < threads_) s.blocks = std::min(blocks, (threads_ + s.panels - 1) / s.panels);
    return s;
  }
  void start(int64_t task) const {
    if (task >= block_.in_channels * batch_) {
      T* image = z_ + (task - block_.in_channels * batch_) * maps_.image();
      std::fill(image, image + maps_.image(), T(0));
      return;
    }
    const int64_t image = task / block_.in_channels, channel = task % block_.in_channels;
    const T* from = at(x0_, image, channel).data;
    std::copy(from, from + maps_.pixels(), states_ + image * maps_.image_stride + channel * maps_.pixels());
  }

  const Block& block_;
  Planes<const T> x0_;
  T *states_, *z_ = nullptr;
  int64_t batch_, groups_, largest_, threads_ = 1;
  BottleneckMaps maps_;
  std::vector<BottleneckLayer<T>> layers_;
};

Tensor dnl_bottleneck_eval(const Tensor& x0_in, const Tensor& packed, const std::vector<int64_t>& connectivity,
                           int64_t growth, int64_t bottleneck, const std::string& activation) {
  DNL_CHECK(x0_in.dim() == 4, "dnl_bottleneck: x0");
  const Tensor x0 = with_dense_planes(x0_in);
  const Block block(x0.size(1), growth, bottleneck, connectivity);
  DNL_CHECK(packed.scalar_type() == x0.scalar_type() && packed.is_contiguous() && packed.numel() == block.packed,
            "dnl_bottleneck: packed weights of another block");
  const Activation act = activation_of(activation);
  Tensor states = in_large_pages(
      torch::stable::new_empty(x0, {x0.size(0), block.channels(), x0.size(2), x0.size(3)}));
  if (states.numel() == 0) return narrowed(states, x0_in.scalar_type());
  dispatch_float("dnl_bottleneck", x0.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Evaluation<T> evaluation(block, x0, static_cast<const T*>(packed.data_ptr()), act,
                             static_cast<T*>(states.data_ptr()));
    Tensor z = in_large_pages(torch::stable::new_empty(x0, {evaluation.z_size()}));
    evaluation.run(static_cast<T*>(z.data_ptr()));
  });
  return narrowed(states, x0_in.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dnl_bottleneck_fwd(
    const Tensor& x0_in, const Tensors& tensors, bool keep, const std::vector<int64_t>& connectivity, int64_t growth,
    int64_t bottleneck, bool norm, bool training, const std::string& activation, double tau, double eps) {
  DNL_CHECK(x0_in.dim() == 4, "dnl_bottleneck: x0");
  const Tensor x0 = with_dense_planes(x0_in);
  const Block block(x0.size(1), growth, bottleneck, connectivity);
  const Step step(block, tensors, norm, training, activation, tau, eps, x0.size(0), x0.size(2), x0.size(3));
  const int64_t layers = block.layers.size(), measured = step.measures ? 1 : 0, pixels = step.pixels;
  const auto empty = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(x0, sizes); };
  Tensor states = in_large_pages(empty({x0.size(0), block.channels(), x0.size(2), x0.size(3)}));
  Tensor inner = in_large_pages(empty({keep ? layers : 1, pixels * block.padded_wide}));
  Tensor mean = empty({measured * block.channels()}), var = empty({measured * block.channels()});
  Tensor inner_mean = empty({measured * layers, block.wide}), inner_var = empty({measured * layers, block.wide});
  dispatch_float("dnl_bottleneck", x0.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    TrainingForward<T> forward(step, x0, keep, elements_of<T>(states), elements_of<T>(inner),
                               {elements_of<T>(mean), elements_of<T>(var)},
                               {elements_of<T>(inner_mean), elements_of<T>(inner_var)});
    Tensor packed = in_large_pages(torch::stable::new_empty(x0, {block.packed}));
    forward.run(elements_of<T>(packed));
  });
  if (!keep) inner = empty({0, pixels * block.padded_wide});
  return {narrowed(states, x0_in.scalar_type()), narrowed(inner, x0_in.scalar_type()), mean, var, inner_mean, inner_var};
}

std::tuple<Tensor, std::vector<Tensor>> dnl_bottleneck_bwd(
    const Tensor& dstates_in, const Tensor& states_in, const Tensor& inner_in, const Tensor& mean, const Tensor& var,
    const Tensor& inner_mean, const Tensor& inner_var, const Tensors& tensors, const std::vector<int64_t>& connectivity,
    int64_t growth, int64_t bottleneck, bool norm, bool training, const std::string& activation, double tau,
    double eps) {
  DNL_CHECK(states_in.dim() == 4 && same_sizes(dstates_in, states_in), "dnl_bottleneck: states");
  const Tensor states = widened(states_in), inner = widened(inner_in), dstates = with_dense_planes(dstates_in);
  const int64_t layers = triangle_rows(connectivity.size());
  const Block block(states.size(1) - layers * growth, growth, bottleneck, connectivity);
  const Step step(block, tensors, norm, training, activation, tau, eps, states.size(0), states.size(2), states.size(3));
  DNL_CHECK(inner.numel() == layers * step.pixels * block.padded_wide && inner.scalar_type() == states.scalar_type() &&
                dstates.scalar_type() == states.scalar_type(),
            "dnl_bottleneck: what the forward pass kept");
  for (const Tensor* t : {&mean, &var, &inner_mean, &inner_var})
    DNL_CHECK(t->scalar_type() == states.scalar_type() && t->is_contiguous() &&
                  t->numel() == (!step.measures                          ? 0
                                 : t == &inner_mean || t == &inner_var ? layers * block.wide
                                                                        : block.channels()),
              "dnl_bottleneck: statistics");
  Tensor dx0 = torch::stable::new_empty(states, {states.size(0), block.in_channels, states.size(2), states.size(3)});
  std::vector<Tensor> found;
  for (int64_t i = 0; i < int64_t(tensors.size()); i++) {
    const int64_t name = i % kNames;
    if (name == kMean || name == kVar || name == kInnerMean || name == kInnerVar) continue;
    std::vector<int64_t> sizes{0};
    if (tensors[i].has_value()) {
      sizes.resize(tensors[i]->dim());
      for (int64_t d = 0; d < int64_t(sizes.size()); d++) sizes[d] = tensors[i]->size(d);
    }
    found.push_back(torch::stable::new_empty(states, sizes));
  }
  dispatch_float("dnl_bottleneck", states.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (step.pixels == 0) {  // a sum of nothing
      for (const Tensor& t : found) std::fill_n(elements_of<T>(t), t.numel(), T(0));
      return;
    }
    std::vector<T*> gradients;
    for (const Tensor& t : found) gradients.push_back(t.numel() ? elements_of<T>(t) : nullptr);
    TrainingBackward<T> backward(step, planes_of<const T>(dstates), elements_of<const T>(states),
                                 elements_of<const T>(inner), {elements_of<const T>(mean), elements_of<const T>(var)},
                                 {elements_of<const T>(inner_mean), elements_of<const T>(inner_var)},
                                 elements_of<T>(dx0), gradients);
    Tensor room = in_large_pages(torch::stable::new_empty(states, {backward.room()}));
    backward.run(elements_of<T>(room));
  });
  for (int64_t i = 0, at = 0; i < int64_t(tensors.size()); i++) {
    const int64_t name = i % kNames;
    if (name == kMean || name == kVar || name == kInnerMean || name == kInnerVar) continue;
    if (tensors[i].has_value()) found[at] = narrowed(found[at], tensors[i]->scalar_type());
    at++;
  }
  return {narrowed(dx0, states_in.scalar_type()), found};
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("dnl_bottleneck_pack", TORCH_BOX(&dnl::dnl_bottleneck_pack));
  m.impl("dnl_bottleneck_eval", TORCH_BOX(&dnl::dnl_bottleneck_eval));
  m.impl("dnl_bottleneck_fwd", TORCH_BOX(&dnl::dnl_bottleneck_fwd));
  m.impl("dnl_bottleneck_bwd", TORCH_BOX(&dnl::dnl_bottleneck_bwd));
}
