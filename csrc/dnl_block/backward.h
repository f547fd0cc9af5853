// The backward pass of a block, state by state from the last to the first. The gradient of state j is pulled from the
// gradients dY_l of all layers l that read it, which already lie in planes of parts (params.h):
//
//   D_j = sum_l scale_{l,j} * act'(z_{l,j}) * (K_{l,j}^T (*) dY_l),   z_{l,j} = gamma_{l,j} * xhat_j + beta_{l,j}
//
// While a tile of x_j and its activations are in cache, dgamma, dbeta and the weight gradients of all these pairs (l, j)
// are summed too. Batch normalisation is corrected once per channel, when all of its consumers are known:
// dX_j = dOut_j + (D_j - S1_j - xhat_j * S2_j) / sigma_j, S1 = mean of sum_l gamma dbeta, S2 = mean of sum_l gamma dgamma.
//
// Sums over samples are kept for a fixed number of chunks and added in order: results do not depend on the threads.
#pragma once
#include <cmath>

#include "dnl_block/block.h"

namespace dnl {

template <class T>
struct BlockGradients {
  Planes<T> x0;
  T* weight;                     // as BlockTensors
  T *bias, *gamma, *beta;        // as BlockTensors; nullptr where there is none
  T* buffer;                     // [groups of images][states' channels] planes of parts: working memory
};

template <class T>
class Backward {
 public:
  Backward(const BlockShape& s, const BlockTensors<T>& t, Planes<const T> states, Planes<const T> outputs,
           Planes<const T> dout, const BlockGradients<T>& g)
      : s_(s), t_(t), states_(states), outputs_(outputs), dout_(dout), g_(g),
        form_(s.form()), group_(s.gradient_plane()) {
    const int64_t pairs = s.channel_offset[s.layers];
    if (s.norm && s.preactivation) {
      const auto fold = [&](int64_t i, int64_t statistic) {
        prologue_.set(i, t.mean[statistic], t.var[statistic], s.eps, t.gamma, t.beta);
        factor_[i] = s.training ? (t.gamma ? t.gamma[i] : T(1)) : prologue_.scale[i];
      };
      prologue_.resize(pairs);
      factor_.resize(pairs);
      for (int64_t l = 0, i = 0; l < s.layers; l++)
        for (const Span& span : s.spans(l))
          for (int64_t c = span.first; c < span.first + span.channels; c++, i++) fold(i, s.training ? c : i);
    }
    transformed_.resize(s.layers);
    parallel_tasks(0, s.layers, 1, [&](int64_t l, int64_t) {
      transformed_[l] = transform_filters(t.weight + s.weight_offset(l), s.growth * s.layer_channels(l), form_);
    });
    if (s.norm && (s.training || !s.preactivation)) {
      centred_.resize(s.statistics());
      for (int64_t c = 0; c < s.statistics(); c++) centred_.set(c, t.mean[c], t.var[c], s.eps, nullptr, nullptr);
    }
  }

  void run() {
    const bool whole = s_.tiling.whole();
    for (int64_t j = s_.layers; j >= 0; j--) {
      prepare(j);
      // A tile of whole images needs nothing from other tiles: the state before is corrected on the way.
      const bool pending = whole && j < s_.layers;
      for_each_chunk([&](int64_t chunk, int64_t i, Scratch& scratch) {
        if (pending) correct_state(j + 1, chunk, i);
        pull_state(j, chunk, i, scratch);
      });
      if (pending) add_bias(j + 1);
      reduce(j);
      if (whole && j > 0) continue;
      for_each_chunk([&](int64_t chunk, int64_t i, Scratch&) { correct_state(j, chunk, i); });
      add_bias(j);
    }
  }

 private:
  bool measures() const { return s_.norm && s_.training; }
  bool sums_pairs() const { return s_.norm && s_.preactivation; }
  // Whether state j is an activated output: the paper's order.
  bool activated(int64_t j) const { return !s_.preactivation && j > 0; }

  // The parts of state j in tile i, or its rows before `correct`.
  Parts<T> gradient(int64_t j, const Tile& tile, int64_t channel = 0) const {
    const int64_t plane = tile.image / s_.tiling.images * s_.channels() + s_.state_first(j) + channel;
    return {g_.buffer + plane * s_.gradient_size() + group_.origin() + tile.row / form_.rows * group_.pitch(),
            group_.length(), s_.gradient_size()};
  }

  template <class Body>
  void for_each_chunk(Body body) {
    const int64_t bytes = 2 * Scratch::bytes<int64_t>(form_.taps) +
                          Scratch::bytes<T>(kConvGroup * form_.parts * (values_length() + products_length()));
    parallel_chunks(chunks_, s_.tiling.count(), [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Scratch scratch(bytes);
        body(chunk, i, scratch);
      }
    });
  }

  int64_t values_length() const { return grouped(s_.tiling.largest()).length(); }
  // A band's products begin a group before the band and end one after it.
  static FlatPlane extended(FlatPlane f, int64_t groups) {
    f.rows += groups;
    return f;
  }
  int64_t products_length() const { return extended(grouped(s_.tiling.largest()), 2).length(); }

  // Filters for state j's consumers, regrouped, and room for the partial sums.
  void prepare(int64_t j) {
    const int64_t n = s_.state_channels(j);
    consumers_ = s_.consumers(j);
    const int64_t count = consumers_.size();
    filters_ = n * s_.filter_size();
    const int64_t affordable = std::max<int64_t>(1, (int64_t(1) << 24) / std::max<int64_t>(1, count * filters_));
    chunks_ = std::min(std::min(s_.tiling.count(), kConvChunks), affordable);
    packed_.resize(count * filters_);
    parallel_tasks(0, count, 1, [&](int64_t k, int64_t) {
      const int64_t l = consumers_[k], at = s_.position(l, j);
      const int64_t channels = s_.layer_channels(l), size = s_.growth * channels * form_.taps;
      for (int64_t part = 0; part < form_.parts; part++)
        pack_transposed(transformed_[l].data() + part * size, s_.growth, channels, form_.taps, T(s_.tau), at, at + n,
                        packed_.data() + k * filters_ + part * (filters_ / form_.parts));
    });
    dweight_.assign(chunks_ * count * filters_, T(0));
    sums_.assign(chunks_ * count * n * 2, 0.0);
    output_sums_.assign(chunks_ * n * 2, 0.0);
    bias_sums_.assign(kConvChunks * s_.growth, 0.0);
  }

  // D_j in tile i, and this tile's share of the parameters' gradients.
  void pull_state(int64_t j, int64_t chunk, int64_t i, Scratch& scratch) {
    const Tile tile = s_.tiling.tile(i);
    const bool mixed = form_.rows > 1;
    const int64_t lead = mixed && tile.row > 0, trail = mixed && tile.row + tile.flat.rows < s_.height;
    const FlatPlane f = grouped(tile.flat), wide = extended(f, lead + trail);
    const int64_t first = s_.state_first(j), channels = s_.state_channels(j), count = consumers_.size();
    const int64_t part_filters = filters_ / form_.parts;
    int64_t *taps = scratch.take<int64_t>(form_.taps), *mirrored = scratch.take<int64_t>(form_.taps);
    tap_offsets(f, false, taps);
    tap_offsets(f, true, mirrored);
    T* value = scratch.take<T>(kConvGroup * form_.parts * values_length()) + f.origin();
    T* products = scratch.take<T>(kConvGroup * form_.parts * products_length()) + wide.origin();
    const Activation act = s_.preactivation ? s_.activation : kIdentity;
    DNL_ISA_CALL(clear_padding<T>(tile, std::min(kConvGroup, channels), value));
    for_each_group(channels, [&](int64_t c, int64_t n) {
      const Planes<const T> x = at(states_, tile.image, first + c);
      const Parts<T> total = gradient(j, tile, c);
      const Parts<const T> found{products + lead * wide.pitch(), n * wide.length(), wide.length()};
      for (int64_t m = 0; count == 0 && m < n * form_.rows; m++) {
        T* rows = total.data + m / form_.rows * total.channel + m % form_.rows * total.part;
        std::fill(rows, rows + f.span(), T(0));
      }
      for (int64_t k = 0; k < count; k++) {
        const int64_t l = consumers_[k], pair = s_.channel_offset[l] + s_.position(l, j) + c;
        const auto of = [](const std::vector<T>& v, int64_t at) { return v.empty() ? nullptr : v.data() + at; };
        const T *scale = of(prologue_.scale, pair), *shift = of(prologue_.shift, pair);
        const T *rate = s_.preactivation ? of(centred_.scale, first + c) : nullptr;
        const T *offset = s_.preactivation ? of(centred_.shift, first + c) : nullptr;
        const Parts<T> dy = gradient(l + 1, tile);
        const bool more = k + 1 < count && s_.tiling.whole();
        const Ahead next = more ? Ahead{gradient(consumers_[k + 1] + 1, tile).data,
                                        s_.growth * s_.gradient_size() * static_cast<int64_t>(sizeof(T))}
                                : Ahead{};
        DNL_ISA_CALL(gather<T>(tile, x, n, scale, shift, act, value));
        for (int64_t part = 0; part < form_.parts; part++) {
          const T* w = packed_.data() + k * filters_ + part * part_filters + c * s_.growth * form_.taps;
          DNL_ISA_CALL(convolve<T>(wide, {dy.data + part * dy.part - lead * wide.pitch(), dy.channel}, s_.growth,
                                   mirrored, form_.taps, w, n, nullptr, false,
                                   {products + part * n * wide.length(), wide.length()},
                                   next.share(part, form_.parts)));
        }
        double* sum = sums_.data() + ((chunk * count + k) * channels + c) * 2;
        DNL_ISA_CALL(pull<T>(tile, found, lead, trail, n, x, scale, shift, act, rate, offset, of(factor_, pair), k > 0,
                             total, sums_pairs() ? sum : nullptr));
        for (int64_t part = 0; part < form_.parts; part++) {
          T* dw = dweight_.data() + (chunk * count + k) * filters_ + part * part_filters + c * form_.taps * s_.growth;
          for_each_group(s_.growth, [&](int64_t o, int64_t outputs) {
            DNL_ISA_CALL(weight_gradient<T>(f, {value + part * f.length(), form_.parts * f.length()}, n, taps,
                                            form_.taps, {dy.data + part * dy.part + o * dy.channel, dy.channel}, outputs,
                                            dw + o, s_.growth));
          });
        }
      }
    });
    if (activated(j)) through_activation(j, chunk, tile);
  }

  // total = (total + dOut_j) * act'(norm(y)), and the sums of the output's normalisation.
  void through_activation(int64_t j, int64_t chunk, const Tile& tile) {
    const int64_t first = (j - 1) * s_.growth;
    const auto of = [&](const T* p) { return p ? p + first : nullptr; };
    const T *rate = s_.norm ? centred_.scale.data() : nullptr, *offset = s_.norm ? centred_.shift.data() : nullptr;
    DNL_ISA_CALL(through<T>(tile, s_.growth, at(outputs_, tile.image, first),
                            at(dout_, tile.image, s_.state_first(j)), of(t_.gamma), of(t_.beta), s_.activation, of(rate),
                            of(offset), gradient(j, tile), output_sums_.data() + chunk * s_.growth * 2));
  }

  // The partial sums of step j, added in the order of the chunks.
  void reduce(int64_t j) {
    const int64_t n = s_.state_channels(j), count = consumers_.size();
    const auto total = [&](const std::vector<double>& sums, int64_t row, int64_t i) {
      double s = 0;
      for (int64_t chunk = 0; chunk < chunks_; chunk++) s += sums[chunk * row + i];
      return s;
    };
    const double elements = static_cast<double>(std::max<int64_t>(1, s_.elements()));
    mean_plain_.assign(n, 0.0);
    mean_moment_.assign(n, 0.0);
    for (int64_t k = 0; sums_pairs() && k < count; k++)
      for (int64_t c = 0; c < n; c++) {
        const int64_t pair = s_.channel_offset[consumers_[k]] + s_.position(consumers_[k], j) + c;
        const double plain = total(sums_, count * n * 2, (k * n + c) * 2);
        const double moment = total(sums_, count * n * 2, (k * n + c) * 2 + 1);
        const double gamma = t_.gamma ? double(t_.gamma[pair]) : 1.0;
        mean_plain_[c] += gamma * plain / elements;
        mean_moment_[c] += gamma * moment / elements;
        g_.beta[pair] = static_cast<T>(plain);
        // With given statistics the moment is one of x, not of xhat.
        g_.gamma[pair] = static_cast<T>(
            s_.training ? moment : (moment - double(t_.mean[pair]) * plain) / std::sqrt(double(t_.var[pair]) + s_.eps));
      }
    for (int64_t c = 0; activated(j) && s_.norm && c < n; c++) {
      const int64_t at = (j - 1) * s_.growth + c;
      const double plain = total(output_sums_, n * 2, c * 2), moment = total(output_sums_, n * 2, c * 2 + 1);
      mean_plain_[c] = plain / elements;
      mean_moment_[c] = moment / elements;
      g_.beta[at] = static_cast<T>(plain);
      g_.gamma[at] = static_cast<T>(moment);
    }
    parallel_tasks(0, count, 1, [&](int64_t k, int64_t) {
      const int64_t l = consumers_[k], at = s_.position(l, j), channels = s_.layer_channels(l);
      std::vector<double> sum(filters_, 0.0);
      for (int64_t chunk = 0; chunk < chunks_; chunk++) {
        const T* part = dweight_.data() + (chunk * count + k) * filters_;
        for (int64_t i = 0; i < filters_; i++) sum[i] += part[i];
      }
      T* dw = g_.weight + s_.weight_offset(l) + at * s_.taps;
      const std::vector<double> found = untransform_filters(sum, n, s_.growth, form_);
      for (int64_t o = 0; o < s_.growth; o++)
        for (int64_t i = 0; i < n * s_.taps; i++)
          dw[o * channels * s_.taps + i] = static_cast<T>(found[i * s_.growth + o] * s_.tau);
    });
    coefficients(j);
  }

  // dX_j (or dY_{j-1} in the paper's order) = a * gradient + b * (x - m) + c [+ dOut]
  void coefficients(int64_t j) {
    const int64_t n = s_.state_channels(j), first = s_.preactivation ? s_.state_first(j) : (j - 1) * s_.growth;
    a_.assign(n, T(1));
    b_.assign(n, T(0));
    c_.assign(n, T(0));
    m_.assign(n, T(0));
    corrects_ = s_.norm && (s_.preactivation ? s_.training : j > 0);
    for (int64_t k = 0; corrects_ && k < n; k++) {
      const double rate = 1.0 / std::sqrt(double(t_.var[first + k]) + s_.eps);
      const double scale = rate * (!s_.preactivation && t_.gamma ? double(t_.gamma[first + k]) : 1.0);
      a_[k] = static_cast<T>(scale);
      if (!s_.training) continue;
      b_[k] = static_cast<T>(-scale * rate * mean_moment_[k]);
      c_[k] = static_cast<T>(-scale * mean_plain_[k]);
      m_[k] = t_.mean[first + k];
    }
  }

  void correct_state(int64_t j, int64_t chunk, int64_t i) {
    const Tile tile = s_.tiling.tile(i);
    const int64_t n = s_.state_channels(j);
    Planes<const T> x{nullptr, 0, 0}, dout{nullptr, 0, 0};
    if (corrects_ && s_.training)
      x = s_.preactivation ? at(states_, tile.image, s_.state_first(j)) : at(outputs_, tile.image, (j - 1) * s_.growth);
    if (!activated(j)) dout = at(dout_, tile.image, s_.state_first(j));
    double* sums = j > 0 && g_.bias ? bias_sums_.data() + chunk * s_.growth : nullptr;
    DNL_ISA_CALL(correct<T>(tile, n, a_.data(), b_.data(), c_.data(), m_.data(), x, dout, gradient(j, tile),
                            j ? Planes<T>{nullptr, 0, 0} : at(g_.x0, tile.image, 0), sums));
  }

  void add_bias(int64_t j) {
    for (int64_t o = 0; j > 0 && g_.bias && o < s_.growth; o++) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < kConvChunks; chunk++) sum += bias_sums_[chunk * s_.growth + o];
      g_.bias[(j - 1) * s_.growth + o] = static_cast<T>(sum);
    }
  }

  const BlockShape& s_;
  const BlockTensors<T>& t_;
  Planes<const T> states_, outputs_, dout_;
  BlockGradients<T> g_;
  const Form form_;
  const FlatPlane group_;
  Folded<T> prologue_;     // of every pair: act's argument from x
  std::vector<T> factor_;  // of every pair: its derivative by what the pair's moment is taken of, xhat or x
  Folded<T> centred_;      // xhat from x, of every channel with statistics
  std::vector<std::vector<T>> transformed_;  // G w of every layer
  // Of the step at hand.
  std::vector<int64_t> consumers_;
  int64_t filters_ = 0, chunks_ = 0;
  std::vector<T> packed_, dweight_;
  std::vector<double> sums_, output_sums_, bias_sums_, mean_plain_, mean_moment_;
  std::vector<T> a_, b_, c_, m_;
  bool corrects_ = false;
};

}  // namespace dnl
