// dnl_block on the CPU, kernel = "local": one prefix buffer, statistics once per channel, no concatenation. Meaning:
// dnl_kernels/ops/dnl_block/reference.py; the backward pass is in backward.h.
#include <cmath>

#include "dnl_block/backward.h"
#include "dnl_block/block.h"
#include "dnl_block/wide.h"

namespace dnl {
namespace {

// All layers of a forward pass. Without statistics of this batch nothing crosses samples, and a tile of whole images
// runs through all layers while it stays in cache.
template <class T>
class Forward {
 public:
  static constexpr int64_t kBlock = 12;  // input channels at a time: few enough to stay in cache

  Forward(const BlockShape& s, const BlockTensors<T>& t, Planes<const T> x0, Planes<T> states, Planes<T> outputs,
          T* mean, T* var)
      : s_(s), t_(t), x0_(x0), states_(states), outputs_(outputs), mean_(mean), var_(var) {
    packed_.resize(s.wide() ? 0 : s.packed_offset(s.layers));
    parallel_tasks(0, s.wide() ? 0 : s.layers, 1, [&](int64_t l, int64_t) {
      const Form form = s.form();
      const int64_t channels = s.layer_channels(l), size = s.growth * channels * form.taps;
      const std::vector<T> parts = transform_filters(t.weight + s.weight_offset(l), s.growth * channels, form);
      for (int64_t k = 0; k < form.parts; k++)
        pack_filters(parts.data() + k * size, s.growth, channels, form.taps, T(s.tau),
                     packed_.data() + s.packed_offset(l) + k * size);
    });
    const int64_t folds = s.preactivation ? s.channel_offset[s.layers] : s.layers * s.growth;
    folded_.resize(s.norm ? folds : 0);
    if (s.norm && !s.training)
      for (int64_t i = 0; i < folds; i++) folded_.set(i, t.mean[i], t.var[i], s.eps, t.gamma, t.beta);
    if (measures()) found_.resize(s.tiling.count() * std::max(s.in_channels, s.growth));
  }

  void run() {
    if (s_.wide()) return run_wide();
    if (!measures() && s_.tiling.whole()) {
      for_each_tile([&](int64_t i, Scratch& scratch) {
        copy_input(i);
        for (int64_t l = 0; l < s_.layers; l++) {
          accumulate(l, i, scratch);
          if (!s_.preactivation) activate_output(l, i);
        }
      });
      return;
    }
    for_each_tile([&](int64_t i, Scratch&) { copy_input(i); });
    if (s_.preactivation) finish(0, s_.in_channels);
    for (int64_t l = 0; l < s_.layers; l++) {
      if (s_.preactivation && measures()) fold_reads(l);
      for_each_tile([&](int64_t i, Scratch& scratch) { accumulate(l, i, scratch); });
      const int64_t first = s_.preactivation ? s_.state_first(l + 1) : l * s_.growth;
      finish(first, s_.growth);
      if (s_.preactivation) continue;
      for (int64_t c = first; measures() && c < first + s_.growth; c++)
        folded_.set(c, mean_[c], var_[c], s_.eps, t_.gamma, t_.beta);
      for_each_tile([&](int64_t i, Scratch&) { activate_output(l, i); });
    }
  }

 private:
  bool measures() const { return s_.norm && s_.training; }

  void run_wide() {
    const TileGrid grid{s_.batch, s_.height, s_.width};
    const Planes<const T> states{states_.data, states_.image_stride, states_.channel_stride};
    for_each_tile([&](int64_t i, Scratch&) { copy_input(i); });
    if (s_.preactivation) finish(0, s_.in_channels);
    for (int64_t l = 0; l < s_.layers; l++) {
      if (s_.preactivation && measures()) fold_reads(l);
      const bool prologue = s_.preactivation && s_.norm;
      const T* scale = prologue ? folded_.scale.data() + s_.channel_offset[l] : nullptr;
      const T* shift = prologue ? folded_.shift.data() + s_.channel_offset[l] : nullptr;
      const std::vector<T> filters =
          wide_filters(t_.weight + s_.weight_offset(l), s_.growth, s_.layer_channels(l), s_.tau);
      const Planes<T> target = s_.preactivation ? states_ : outputs_;
      const int64_t first = s_.preactivation ? s_.state_first(l + 1) : l * s_.growth;
      convolve_wide(grid, wide_inputs<T>(s_, l, states, scale, shift), filters.data(), s_.growth,
                    [&](int64_t, int64_t o, int64_t image, int64_t row, int64_t x, int64_t n, const T* sums) {
                      T* y = at(target, image, first + o).data + row * s_.width + x;
                      activate_row(sums, n, T(1), t_.bias ? t_.bias[l * s_.growth + o] : T(0), kIdentity, y);
                      if (s_.preactivation || measures()) return;
                      const int64_t c = l * s_.growth + o;
                      activate_row(y, n, s_.norm ? folded_.scale[c] : T(1), s_.norm ? folded_.shift[c] : T(0),
                                   s_.activation,
                                   at(states_, image, s_.in_channels + c).data + row * s_.width + x);
                    });
      if (!measures()) continue;
      for_each_tile([&](int64_t i, Scratch&) { measure(target, first, s_.growth, i); });
      finish(first, s_.growth);
      if (s_.preactivation) continue;
      for (int64_t c = first; c < first + s_.growth; c++)
        folded_.set(c, mean_[c], var_[c], s_.eps, t_.gamma, t_.beta);
      for_each_tile([&](int64_t i, Scratch&) { activate_output(l, i); });
    }
  }

  static void activate_row(const T* from, int64_t n, T scale, T shift, Activation activation, T* to) {
    DNL_ISA_CALL(activate_run<T>(from, n, scale, shift, static_cast<const T*>(nullptr), activation, to,
                                 static_cast<T*>(nullptr)));
  }

  template <class Body>
  void for_each_tile(Body body) {
    const int64_t length = grouped(s_.tiling.largest()).length(), planes = (kBlock + s_.growth) * s_.form().parts;
    const int64_t bytes = Scratch::bytes<int64_t>(s_.form().taps) + Scratch::bytes<T>(planes * length);
    parallel_tasks(0, s_.tiling.count(), 1, [&](int64_t i, int64_t) {
      Scratch scratch(bytes);
      body(i, scratch);
    });
  }

  void copy_input(int64_t i) {
    const Tile tile = s_.tiling.tile(i);
    const int64_t offset = tile.row * s_.width, n = tile.flat.rows * s_.width;
    for (int64_t b = 0; b < tile.flat.images; b++)
      for (int64_t c = 0; c < s_.in_channels; c++) {
        const T* from = at(x0_, tile.image + b, c).data + offset;
        std::copy(from, from + n, at(states_, tile.image + b, c).data + offset);
      }
    if (s_.preactivation) measure(states_, 0, s_.in_channels, i);
  }

  // Statistics of some channels within a tile, while it is in cache.
  void measure(Planes<T> from, int64_t first, int64_t channels, int64_t i) {
    if (!measures()) return;
    const Tile tile = s_.tiling.tile(i);
    const int64_t n = tile.flat.rows * s_.width;
    for (int64_t c = 0; c < channels; c++) {
      Moments sum;
      for (int64_t b = 0; b < tile.flat.images; b++) {
        double mean, deviations;
        DNL_ISA_CALL(moments<T>(at(from, tile.image + b, first + c).data + tile.row * s_.width, n, &mean, &deviations));
        sum.add(static_cast<double>(n), mean, deviations);
      }
      found_[i * channels + c] = sum;
    }
  }

  // Statistics of channels [first, first + channels) over all tiles.
  void finish(int64_t first, int64_t channels) {
    if (!measures()) return;
    for (int64_t c = 0; c < channels; c++) {
      Moments sum;
      for (int64_t i = 0; i < s_.tiling.count(); i++) {
        const Moments& part = found_[i * channels + c];
        sum.add(part.count, part.mean, part.deviations);
      }
      mean_[first + c] = static_cast<T>(sum.mean);
      var_[first + c] = static_cast<T>(sum.count > 0 ? sum.deviations / sum.count : 0.0);
    }
  }

  void fold_reads(int64_t l) {
    int64_t i = s_.channel_offset[l];
    for (const Span& span : s_.spans(l))
      for (int64_t c = span.first; c < span.first + span.channels; c++, i++)
        folded_.set(i, mean_[c], var_[c], s_.eps, t_.gamma, t_.beta);
  }

  // y_l = tau * sum_j K_{l,j} (*) prologue(x_j) + a_l in tile i, into the states buffer or, if the activation comes
  // after it, into `outputs`.
  void accumulate(int64_t l, int64_t i, Scratch scratch) {
    const Tile tile = s_.tiling.tile(i);
    const FlatPlane f = grouped(tile.flat);
    const Form form = s_.form();
    const int64_t length = f.length();
    int64_t* taps = scratch.take<int64_t>(form.taps);
    tap_offsets(f, false, taps);
    T* in = scratch.take<T>((kBlock + s_.growth) * form.parts * length) + f.origin();
    T* out = in + kBlock * form.parts * length;
    DNL_ISA_CALL(clear_padding<T>(tile, std::min(kBlock, s_.layer_channels(l)), in));
    const bool prologue = s_.preactivation && s_.norm;
    const Activation activation = s_.preactivation ? s_.activation : kIdentity;
    const int64_t offset = s_.channel_offset[l], channels = s_.layer_channels(l);
    int64_t channel = 0;
    for (const Span& span : s_.spans(l))
      for (int64_t c = 0; c < span.channels; c += kBlock) {
        const int64_t n = std::min(kBlock, span.channels - c);
        const T* scale = prologue ? folded_.scale.data() + offset + channel : nullptr;
        const T* shift = prologue ? folded_.shift.data() + offset + channel : nullptr;
        const Planes<T> x = at(states_, tile.image, span.first + c);
        DNL_ISA_CALL(gather<T>(tile, {x.data, x.image_stride, x.channel_stride}, n, scale, shift, activation, in));
        // The channels after these, for the last group of outputs to ask for.
        const int64_t left = f.images == 1 ? std::min(kBlock, span.channels - c - n) : 0;
        const Ahead next{x.data + n * x.channel_stride + tile.row * s_.width,
                         left * x.channel_stride * static_cast<int64_t>(sizeof(T))};
        for (int64_t k = 0; k < form.parts; k++)
          for_each_group(s_.growth, [&](int64_t o, int64_t outputs) {
            const T* w = packed_.data() + s_.packed_offset(l) +
                         (k * s_.growth * channels + o * channels + channel * outputs) * form.taps;
            DNL_ISA_CALL(convolve<T>(f, {in + k * length, form.parts * length}, n, taps, form.taps, w, outputs, nullptr,
                                     channel > 0, {out + (k * s_.growth + o) * length, length},
                                     o + outputs == s_.growth ? next.share(k, form.parts) : Ahead{}));
          });
        channel += n;
      }
    if (channel == 0) std::fill(out - f.origin(), out - f.origin() + form.parts * s_.growth * length, T(0));
    const Planes<T> target = s_.preactivation ? states_ : outputs_;
    const int64_t first = s_.preactivation ? s_.state_first(l + 1) : l * s_.growth;
    const T* bias = t_.bias ? t_.bias + l * s_.growth : nullptr;
    DNL_ISA_CALL(scatter<T>(tile, {out, s_.growth * length, length}, s_.growth, bias, at(target, tile.image, first)));
    measure(target, first, s_.growth, i);
  }

  // x_{l+1} = act(norm(y_l)), the paper's order
  void activate_output(int64_t l, int64_t i) {
    const Tile tile = s_.tiling.tile(i);
    const int64_t offset = tile.row * s_.width, n = tile.flat.rows * s_.width, first = l * s_.growth;
    for (int64_t b = 0; b < tile.flat.images; b++)
      for (int64_t c = first; c < first + s_.growth; c++) {
        const T scale = s_.norm ? folded_.scale[c] : T(1), shift = s_.norm ? folded_.shift[c] : T(0);
        const T* y = at(outputs_, tile.image + b, c).data + offset;
        T* x = at(states_, tile.image + b, s_.in_channels + c).data + offset;
        DNL_ISA_CALL(activate_run<T>(y, n, scale, shift, static_cast<const T*>(nullptr), s_.activation, x,
                                     static_cast<T*>(nullptr)));
      }
  }

  const BlockShape& s_;
  const BlockTensors<T>& t_;
  Planes<const T> x0_;
  Planes<T> states_, outputs_;
  T *mean_, *var_;
  std::vector<T> packed_;
  Folded<T> folded_;
  std::vector<Moments> found_;
};

BlockShape describe(const Tensor& x, int64_t in_channels, const std::vector<int64_t>& connectivity, int64_t growth,
                    int64_t size, bool preactivation, bool norm, bool training, const std::string& activation,
                    double tau, double eps) {
  DNL_CHECK(x.dim() == 4 && growth > 0 && size % 2 == 1 && in_channels > 0, "dnl_block: sizes");
  BlockShape s{x.size(0), in_channels, x.size(2), x.size(3), 0, growth, size, size * size, preactivation, norm,
               training, activation_of(activation), tau, eps, {}, {0}, Tiling(x.size(0), x.size(2), x.size(3), size / 2)};
  DNL_CHECK(size == 1 || size == 3, "dnl_block: filters are 1 x 1 or 3 x 3");
  const int64_t group = s.form().rows;  // a tile begins with one
  s.tiling.rows = std::min(s.height, (s.tiling.rows + group - 1) / group * group);
  // Row l of the lower triangle has l + 1 entries.
  for (size_t begin = 0; begin < connectivity.size(); s.layers++) {
    DNL_CHECK(begin + s.layers + 1 <= connectivity.size(), "dnl_block: connectivity is not a triangle");
    std::vector<int64_t> row;
    int64_t channels = 0;
    for (int64_t j = 0; j <= s.layers; j++)
      if (connectivity[begin + j]) {
        row.push_back(j);
        channels += s.state_channels(j);
      }
    begin += s.layers + 1;
    s.reads.push_back(row);
    s.channel_offset.push_back(s.channel_offset.back() + channels);
  }
  return s;
}

template <class T>
void copy_planes(Planes<const T> from, Planes<T> to, const BlockShape& s, int64_t channels) {
  const int64_t pixels = s.height * s.width;
  parallel_tasks(0, s.batch * channels, grain_for(s.batch * channels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const T* plane = at(from, i / channels, i % channels).data;
      std::copy(plane, plane + pixels, at(to, i / channels, i % channels).data);
    }
  });
}

// The parameter vectors, checked against the shape; the tensors own what the pointers show.
struct Parameters {
  Tensor weight;
  std::optional<Tensor> bias, gamma, beta, mean, var;

  Parameters(const BlockShape& s, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
             const std::optional<Tensor>& gamma_in, const std::optional<Tensor>& beta_in,
             const std::optional<Tensor>& mean_in, const std::optional<Tensor>& var_in, bool batch_statistics)
      : weight(torch::stable::contiguous(weight_in)) {
    const ScalarType type = weight.scalar_type();
    const int64_t pairs = s.channel_offset[s.layers], outputs = s.layers * s.growth;
    const int64_t norms = s.preactivation ? pairs : outputs;
    const auto checked = [&](const std::optional<Tensor>& t, int64_t length, const char* name) {
      if (!t.has_value()) return std::optional<Tensor>();
      DNL_CHECK(t->numel() == length && t->scalar_type() == type, "dnl_block: ", name);
      return std::optional<Tensor>(torch::stable::contiguous(*t));
    };
    DNL_CHECK(weight.numel() == pairs * s.growth * s.taps, "dnl_block: weight");
    bias = checked(bias_in, outputs, "bias");
    gamma = checked(gamma_in, norms, "gamma");
    beta = checked(beta_in, norms, "beta");
    mean = checked(mean_in, batch_statistics ? s.statistics() : norms, "mean");
    var = checked(var_in, batch_statistics ? s.statistics() : norms, "var");
  }

  template <class T>
  BlockTensors<T> tensors() const {
    return {elements_of<const T>(weight), data_or_null<T>(bias), data_or_null<T>(gamma),
            data_or_null<T>(beta), data_or_null<T>(mean), data_or_null<T>(var)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> dnl_block_fwd(
    const Tensor& x0_in, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
    std::vector<int64_t> connectivity, int64_t growth_rate, int64_t size, bool preactivation, bool norm, bool training,
    std::string activation, double tau, double eps) {
  const BlockShape s = describe(x0_in, x0_in.size(1), connectivity, growth_rate, size, preactivation, norm, training,
                                activation, tau, eps);
  const bool measures = norm && training;
  const Parameters p(s, weight, bias, gamma, beta, measures ? std::nullopt : mean, measures ? std::nullopt : var, false);
  DNL_CHECK(measures || !norm || (mean.has_value() && var.has_value()), "dnl_block: no statistics");
  const Tensor x0 = with_dense_planes(x0_in);
  DNL_CHECK(x0.scalar_type() == p.weight.scalar_type(), "dnl_block: element types differ");
  Tensor states = in_large_pages(torch::stable::new_empty(x0, {s.batch, s.channels(), s.height, s.width}));
  Tensor outputs = in_large_pages(
      torch::stable::new_empty(x0, {s.batch, preactivation ? 0 : s.layers * s.growth, s.height, s.width}));
  Tensor found_mean = torch::stable::new_empty(x0, {measures ? s.statistics() : 0});
  Tensor found_var = torch::stable::new_empty(x0, {measures ? s.statistics() : 0});
  dispatch_float("dnl_block", x0.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const BlockTensors<T> t = p.tensors<T>();
    Forward<T>(s, t, planes_of<const T>(x0), planes_of<T>(states), planes_of<T>(outputs),
               static_cast<T*>(found_mean.data_ptr()), static_cast<T*>(found_var.data_ptr()))
        .run();
  });
  return {states, found_mean, found_var, outputs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dnl_block_bwd(
    const Tensor& dstates_in, const Tensor& states_in, const Tensor& outputs_in, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, std::vector<int64_t> connectivity,
    int64_t growth_rate, int64_t size, bool preactivation, bool norm, bool training, std::string activation, double tau,
    double eps) {
  const Tensor states = with_dense_planes(states_in), dstates = with_dense_planes(dstates_in);
  const Tensor outputs = with_dense_planes(outputs_in);
  int64_t layers = 0;  // of a triangle with so many entries
  while (layers * (layers + 1) / 2 < static_cast<int64_t>(connectivity.size())) layers++;
  const int64_t in_channels = states.size(1) - layers * growth_rate;
  const BlockShape s = describe(states, in_channels, connectivity, growth_rate, size, preactivation, norm, training,
                                activation, tau, eps);
  const Parameters p(s, weight, bias, gamma, beta, mean, var, norm && training);
  DNL_CHECK(same_sizes(states, dstates) && states.scalar_type() == p.weight.scalar_type() &&
                dstates.scalar_type() == p.weight.scalar_type(),
            "dnl_block: states or their gradient");
  DNL_CHECK(!norm || (p.mean.has_value() && p.var.has_value()), "dnl_block: no statistics");
  DNL_CHECK(outputs.size(1) == (preactivation ? 0 : s.layers * s.growth), "dnl_block: outputs");
  const int64_t norms = !norm ? 0 : preactivation ? s.channel_offset[s.layers] : s.layers * s.growth;
  Tensor dx0 = in_large_pages(torch::stable::new_empty(states, {s.batch, in_channels, s.height, s.width}));
  Tensor dweight = torch::stable::new_empty(states, {p.weight.numel()});
  Tensor dbias = torch::stable::new_empty(states, {bias.has_value() ? s.layers * s.growth : 0});
  Tensor dgamma = torch::stable::new_empty(states, {norms}), dbeta = torch::stable::new_empty(states, {norms});
  if (s.wide_backward()) {
    Tensor total = in_large_pages(torch::stable::new_empty(states, {s.batch, s.channels(), s.height, s.width}));
    dispatch_float("dnl_block", states.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      copy_planes(planes_of<const T>(dstates), planes_of<T>(total), s, s.channels());
      backward_wide<T>(s, p.tensors<T>(), planes_of<const T>(states), planes_of<const T>(outputs), planes_of<T>(total),
                       static_cast<T*>(dweight.data_ptr()),
                       dbias.numel() ? static_cast<T*>(dbias.data_ptr()) : nullptr);
      copy_planes(planes_of<const T>(total), planes_of<T>(dx0), s, in_channels);
    });
    return {dx0, dweight, dbias, dgamma, dbeta};
  }
  // The gradients of all states, each group of images in planes of parts: the next layers convolve them as they lie.
  Tensor gradients =
      in_large_pages(torch::stable::new_empty(states, {s.tiling.groups() * s.channels() * s.gradient_size()}));
  dispatch_float("dnl_block", states.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto pointer = [](Tensor& t) { return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr; };
    const BlockTensors<T> t = p.tensors<T>();
    const BlockGradients<T> g{planes_of<T>(dx0),  static_cast<T*>(dweight.data_ptr()),   pointer(dbias),
                              pointer(dgamma),    pointer(dbeta),
                              static_cast<T*>(gradients.data_ptr())};
    Backward<T>(s, t, planes_of<const T>(states), planes_of<const T>(outputs), planes_of<const T>(dstates), g).run();
  });
  return {dx0, dweight, dbias, dgamma, dbeta};
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("dnl_block_fwd", TORCH_BOX(&dnl::dnl_block_fwd));
  m.impl("dnl_block_bwd", TORCH_BOX(&dnl::dnl_block_bwd));
}
