// A training step of a bottleneck block: what both directions share, and the forward pass. The number of partial sums
// depends on the sizes alone, never on the threads: results do not either. Included by cpu.cpp.
#pragma once
#include <algorithm>
#include <cmath>

#include "dnl_bottleneck/block.h"

namespace dnl {
namespace {

// Pieces of at most `largest`, and not much less: an even number where there are few, so that two threads get the same.
int64_t pieces_by_size(int64_t count, int64_t largest) {
  const int64_t least = (count + largest - 1) / largest;
  return least < 16 && count >= 16 ? round_up(least, 2) : least;
}

// Into how many shares of `most` the work of each of `pieces` is cut, so that every thread has as much of it.
int64_t shares_of(int64_t pieces, int64_t most, int64_t threads) {
  int64_t n = 1;
  while (n < most && pieces * n < 4 * threads && pieces * n % threads != 0) n++;
  return n;
}

constexpr int64_t share(int64_t i, int64_t pieces, int64_t count) { return i * count / pieces; }

// The norm of a layer's input or of its y: vectors of the user, in double; where the block does not measure, the
// statistics too.
struct NormVectors {
  std::vector<double> gamma, beta, mean, var;

  NormVectors(bool norm, bool measures, int64_t size, const std::optional<Tensor>* t)
      : gamma(vector_of(norm ? t[0] : std::nullopt, size, 1)),
        beta(vector_of(norm ? t[1] : std::nullopt, size, 0)),
        mean(vector_of(norm && !measures ? t[2] : std::nullopt, size, 0)),
        var(vector_of(norm && !measures ? t[3] : std::nullopt, size, 1)) {}
};

// Arguments of both directions, checked and as the kernels read them.
struct Step {
  const Block& block;
  bool measures, norm;  // measures: normalisations use the statistics of this batch
  Activation activation;
  double tau, eps;
  int64_t batch, height, width, pixels;
  std::vector<Tensor> weights, filters;
  std::vector<std::vector<double>> biases;
  std::vector<NormVectors> outer, inner;
  BottleneckMaps maps;

  Step(const Block& block, const Tensors& tensors, bool norm, bool training, const std::string& activation, double tau,
       double eps, int64_t batch, int64_t height, int64_t width)
      : block(block), measures(norm && training), norm(norm), activation(activation_of(activation)), tau(tau), eps(eps),
        batch(batch), height(height), width(width), pixels(batch * height * width) {
    const int64_t layers = block.layers.size();
    DNL_CHECK(layers > 0 && int64_t(tensors.size()) == kNames * layers, "dnl_bottleneck: tensors of every layer");
    maps = {batch, height, width, block.channels() * height * width, block.padded_wide, block.padded_growth, true};
    for (int64_t l = 0; l < layers; l++) {
      const std::optional<Tensor>* t = tensors.data() + l * kNames;
      const int64_t channels = block.layers[l].channels;
      DNL_CHECK(t[kWeight].has_value() && t[kInnerWeight].has_value(), "dnl_bottleneck: weights");
      weights.push_back(widened(*t[kWeight]));
      filters.push_back(widened(*t[kInnerWeight]));
      DNL_CHECK(weights[l].numel() == block.wide * channels && filters[l].numel() == block.growth * block.wide * 9 &&
                    weights[l].scalar_type() == weights[0].scalar_type() &&
                    filters[l].scalar_type() == weights[0].scalar_type(),
                "dnl_bottleneck: shape or type of a weight");
      biases.push_back(vector_of(t[kBias], block.wide, 0));
      outer.emplace_back(norm, measures, channels, t + kGamma);
      inner.emplace_back(norm, measures, block.wide, t + kInnerGamma);
    }
  }
  int64_t layers() const { return block.layers.size(); }
  int64_t wide_blocks() const { return block.padded_wide / kBottleneckBlock; }
  int64_t growth_blocks() const { return block.padded_growth / kBottleneckBlock; }
  double rate(double var) const { return norm ? 1 / std::sqrt(var + eps) : 1; }
};

// Statistics of the batch: of the channels of the states [C], or of every layer's y [layers][wide].
template <class T>
struct Measured {
  T *mean, *var;
};

// scale, shift, mean and rate of the states that a layer reads, in its order, or of its y.
struct Affine {
  double scale, shift, mean, rate;
};
template <class T>
Affine affine_of(const Step& s, const NormVectors& v, int64_t c, Measured<T> m, int64_t at) {
  const double mean = s.measures ? double(m.mean[at]) : v.mean[c], var = s.measures ? double(m.var[at]) : v.var[c];
  const double rate = s.rate(var), scale = v.gamma[c] * rate;
  return {scale, v.beta[c] - mean * scale, mean, rate};
}

// The channels of the states that a layer reads, one after the other.
inline std::vector<int64_t> channels_of(const Layout& l) {
  std::vector<int64_t> found;
  for (const Span& span : l.spans)
    for (int64_t c = 0; c < span.count; c++) found.push_back(span.first + c);
  return found;
}

// Mean and biased variance of channels [begin, end) from what bottleneck_moments found in pieces of count(i) numbers.
template <class T, class Count>
void combine_moments(const T* pieces, int64_t count, int64_t stride, const Count& numbers, int64_t begin, int64_t end,
                     T* mean, T* var) {
  constexpr int64_t kAtOnce = 16;
  for (int64_t first = begin; first < end; first += kAtOnce) {
    const int64_t n = std::min(kAtOnce, end - first);
    double total = 0, middle[kAtOnce] = {}, apart[kAtOnce] = {};
    for (int64_t i = 0; i < count; i++) {
      const T *near = pieces + 3 * i * stride + first, *plain = near + stride;
      const double weight = numbers(i);
      total += weight;
      for (int64_t c = 0; c < n; c++) middle[c] += weight * near[c] + plain[c];
    }
    const double each = total > 0 ? 1 / total : 0;
    for (int64_t c = 0; c < n; c++) middle[c] *= each;
    for (int64_t i = 0; i < count; i++) {
      const T *near = pieces + 3 * i * stride + first, *plain = near + stride, *square = plain + stride;
      const double weight = numbers(i);
      for (int64_t c = 0; c < n; c++) {  // sum (x - middle)^2, x - middle = (x - near) + offset
        const double offset = near[c] - middle[c];
        apart[c] += square[c] + offset * (2 * plain[c] + weight * offset);
      }
    }
    for (int64_t c = 0; c < n; c++) {
      mean[first + c] = static_cast<T>(middle[c]);
      var[first + c] = static_cast<T>(std::max(0.0, apart[c] * each));
    }
  }
}

// A copy of x0 into the states with its statistics, and the packing of all weights; then for each layer the scales of
// what it reads, expand, the statistics of y, and contract.
template <class T>
class TrainingForward {
 public:
  TrainingForward(const Step& step, const Tensor& x0, bool keep, T* states, T* inner, Measured<T> outer,
                  Measured<T> inner_measured)
      : s_(step), b_(step.block), maps_(step.maps), x0_(planes_of<const T>(x0)), keep_(keep), states_(states),
        inner_(inner), outer_(outer), inner_measured_(inner_measured) {
    DNL_CHECK(x0.scalar_type() == step.weights[0].scalar_type(), "dnl_bottleneck: type of x0");
    panels_ = pieces_by_size(s_.pixels, kBottleneckPanel);
    groups_ = pieces_by_size(maps_.tiles(), kBottleneckTiles);
    for (int64_t i = 0; i < groups_; i++) group_pixels_.push_back(pixels_of_tiles(i));
    panel_moments_.resize(s_.measures ? panels_ * 3 * b_.padded_wide : 0);
    group_moments_.resize(s_.measures ? groups_ * 3 * b_.padded_growth : 0);
    vectors_.resize(3 * b_.padded_wide);
  }

  void run(T* packed) {
    packed_ = packed;
    threads_ = free_threads();
    const auto prepare = [&] { return ForwardScratch<T>(maps_); };
    const int64_t shares = shares_of(panels_, s_.wide_blocks(), threads_);
    const auto count = [&](int64_t phase) -> int64_t {
      if (phase == 0) return b_.in_channels + s_.layers() * (s_.wide_blocks() + s_.growth_blocks());
      const int64_t counts[] = {1, panels_ * shares, s_.wide_blocks(), groups_};
      return counts[(phase - 1) % 4];
    };
    parallel_phases(2 + 4 * s_.layers(), prepare, count, [&](int64_t phase, int64_t task, ForwardScratch<T>& own) {
      if (phase == 0) return start(task);
      const int64_t l = (phase - 1) / 4;
      if ((phase - 1) % 4 == 0) return scale_states(l);
      const BottleneckLayer<T> layer = layer_of(l);
      T* const y = inner_ + (keep_ ? l * s_.pixels * b_.padded_wide : 0);
      const InnerNorm<T> inner{vectors_.data(), vectors_.data() + b_.padded_wide, vectors_.data() + 2 * b_.padded_wide};
      if ((phase - 1) % 4 == 1) {
        const int64_t panel = task / shares, part = task % shares, blocks = s_.wide_blocks();
        const int64_t first = share(panel, panels_, s_.pixels), n = share(panel + 1, panels_, s_.pixels) - first;
        const int64_t begin = share(part, shares, blocks), end = share(part + 1, shares, blocks);
        DNL_ISA_CALL(bottleneck_expand<T>(maps_, layer, states_, first, n, begin, end, own.panel, y));
        if (s_.measures)
          DNL_ISA_CALL(bottleneck_moments<T>(y + first * maps_.wide + begin * kBottleneckBlock, maps_.wide, n,
                                             (end - begin) * kBottleneckBlock,
                                             panel_moments_.data() + panel * 3 * maps_.wide + begin * kBottleneckBlock,
                                             maps_.wide));
      } else if ((phase - 1) % 4 == 2) {
        scale_inner(l, task);
      } else {
        const int64_t first = share(task, groups_, maps_.tiles()), end = share(task + 1, groups_, maps_.tiles());
        T* const moments = s_.measures ? group_moments_.data() + task * 3 * maps_.growth : nullptr;
        DNL_ISA_CALL(bottleneck_contract_raw<T>(maps_, layer, inner, y, first, end - first, own.transformed,
                                                own.products, own.pixels, states_, moments));
      }
    });
  }

 private:
  int64_t pixels_of_tiles(int64_t group) const {
    int64_t found = 0;
    for (int64_t t = share(group, groups_, maps_.tiles()); t < share(group + 1, groups_, maps_.tiles()); t++) {
      const int64_t at = t % (maps_.tile_rows() * maps_.tile_columns());
      const int64_t y = at / maps_.tile_columns() * 2, x = at % maps_.tile_columns() * 2;
      found += std::min<int64_t>(2, s_.height - y) * std::min<int64_t>(2, s_.width - x);
    }
    return found;
  }
  BottleneckLayer<T> layer_of(int64_t l) const {
    const Layout& at = b_.layers[l];
    return {at.spans.data(), at.channels, packed_ + at.scale, packed_ + at.shift, packed_ + at.weight, packed_ + at.bias,
            packed_ + at.filters, b_.growth, b_.channel_of(l), s_.activation};
  }

  void start(int64_t task) {
    if (task < b_.in_channels) return copy(task);
    task -= b_.in_channels;
    const int64_t each = s_.wide_blocks() + s_.growth_blocks(), l = task / each, i = task % each;
    const Layout& at = b_.layers[l];
    if (i < s_.wide_blocks()) {
      DNL_ISA_CALL(pack_rows<T>(elements_of<const T>(s_.weights[l]), b_.wide, at.channels, T(s_.tau), i, i + 1,
                                packed_ + at.weight));
      for (int64_t o = i * kBottleneckBlock; o < (i + 1) * kBottleneckBlock; o++)
        packed_[at.bias + o] = o < b_.wide ? static_cast<T>(s_.biases[l][o]) : T(0);
      return;
    }
    const int64_t block = i - s_.wide_blocks();
    DNL_ISA_CALL(pack_winograd<T>(elements_of<const T>(s_.filters[l]), b_.growth, b_.wide, false, block, block + 1,
                                  b_.padded_growth, b_.padded_wide, packed_ + at.filters));
  }
  void copy(int64_t channel) {
    double total = 0, middle = 0, deviations = 0;
    for (int64_t image = 0; image < s_.batch; image++) {
      const T* from = at(x0_, image, channel).data;
      std::copy(from, from + maps_.pixels(), states_ + image * maps_.image_stride + channel * maps_.pixels());
      if (!s_.measures) continue;
      double m, d;
      DNL_ISA_CALL(moments<T>(from, maps_.pixels(), &m, &d));
      const double n = maps_.pixels(), sum = total + n, apart = m - middle;
      if (n == 0) continue;
      deviations += d + apart * apart * total * n / sum;
      middle += apart * n / sum;
      total = sum;
    }
    if (!s_.measures) return;
    outer_.mean[channel] = static_cast<T>(middle);
    outer_.var[channel] = static_cast<T>(total > 0 ? deviations / total : 0.0);
  }
  // The statistics of the last slot that was written, and act's argument for the layer.
  void scale_states(int64_t l) {
    if (s_.measures && l > 0)
      combine_moments(group_moments_.data(), groups_, maps_.growth, [&](int64_t i) { return group_pixels_[i]; }, 0,
                      b_.growth, outer_.mean + b_.channel_of(l - 1), outer_.var + b_.channel_of(l - 1));
    if (l == s_.layers()) return;
    const Layout& at = b_.layers[l];
    int64_t c = 0;
    for (const Span& span : at.spans)
      for (int64_t i = 0; i < span.count; i++, c++) {
        const Affine affine = affine_of(s_, s_.outer[l], c, outer_, span.first + i);
        packed_[at.scale + c] = static_cast<T>(affine.scale);
        packed_[at.shift + c] = static_cast<T>(affine.shift);
      }
  }
  void scale_inner(int64_t l, int64_t block) {
    const int64_t begin = block * kBottleneckBlock, end = std::min(begin + kBottleneckBlock, b_.wide);
    const Measured<T> found{inner_measured_.mean + l * b_.wide, inner_measured_.var + l * b_.wide};
    if (s_.measures)
      combine_moments(
          panel_moments_.data(), panels_, maps_.wide,
          [&](int64_t i) { return share(i + 1, panels_, s_.pixels) - share(i, panels_, s_.pixels); }, begin, end,
          found.mean, found.var);
    for (int64_t o = begin; o < begin + kBottleneckBlock; o++) {
      const Affine affine = o < end ? affine_of(s_, s_.inner[l], o, found, o) : Affine{0, 0, 0, 0};
      vectors_[o] = static_cast<T>(affine.scale);
      vectors_[b_.padded_wide + o] = static_cast<T>(affine.shift);
      vectors_[2 * b_.padded_wide + o] = static_cast<T>(affine.mean);
    }
  }

  const Step& s_;
  const Block& b_;
  BottleneckMaps maps_;
  Planes<const T> x0_;
  bool keep_;
  T *states_, *inner_, *packed_ = nullptr;
  Measured<T> outer_, inner_measured_;
  int64_t panels_, groups_, threads_ = 1;
  std::vector<int64_t> group_pixels_;
  std::vector<T> panel_moments_, group_moments_, vectors_;
};

}  // namespace
}  // namespace dnl
