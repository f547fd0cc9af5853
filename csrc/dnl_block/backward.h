// The backward pass of a block, state by state from the last to the first. The gradient of state j is pulled from the
// gradients dY_l of all layers l that read it, which already lie in flat planes:
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
  T* buffer;                     // [groups of images][states' channels] flat planes: working memory
};

template <class T>
class Backward {
 public:
  Backward(const BlockShape& s, const BlockTensors<T>& t, Planes<const T> states, Planes<const T> outputs,
           Planes<const T> dout, const BlockGradients<T>& g)
      : s_(s), t_(t), states_(states), outputs_(outputs), dout_(dout), g_(g),
        group_{s.tiling.images, s.height, s.width, s.tiling.radius} {
    const int64_t pairs = s.channel_offset[s.layers];
    if (s.norm && s.preactivation) {
      prologue_.resize(pairs);
      for (int64_t i = 0; i < pairs; i++) {
        if (s.training) {
          prologue_.scale[i] = t.gamma ? t.gamma[i] : T(1);
          prologue_.shift[i] = t.beta ? t.beta[i] : T(0);
        } else {
          prologue_.set(i, t.mean[i], t.var[i], s.eps, t.gamma, t.beta);
        }
      }
    }
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
        if (pending) correct(j + 1, chunk, i);
        pull(j, chunk, i, scratch);
      });
      if (pending) add_bias(j + 1);
      reduce(j);
      if (whole && j > 0) continue;
      for_each_chunk([&](int64_t chunk, int64_t i, Scratch&) { correct(j, chunk, i); });
      add_bias(j);
    }
  }

 private:
  bool measures() const { return s_.norm && s_.training; }
  bool sums_pairs() const { return s_.norm && s_.preactivation; }
  // Whether state j is an activated output: the paper's order.
  bool activated(int64_t j) const { return !s_.preactivation && j > 0; }

  // Plane 0 of state j in tile i.
  T* gradient(int64_t j, const Tile& tile) const {
    const int64_t plane = tile.image / s_.tiling.images * s_.channels() + s_.state_first(j);
    return g_.buffer + plane * group_.length() + group_.origin() + tile.row * group_.pitch();
  }

  template <class Body>
  void for_each_chunk(Body body) {
    const int64_t length = s_.tiling.largest().length();
    const int64_t bytes = 2 * Scratch::bytes<int64_t>(s_.taps) + Scratch::bytes<T>((1 + 5 * kConvGroup) * length);
    parallel_chunks(chunks_, s_.tiling.count(), [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Scratch scratch(bytes);
        body(chunk, i, scratch);
      }
    });
  }

  // Filters for state j's consumers, regrouped, and room for the partial sums.
  void prepare(int64_t j) {
    const int64_t n = s_.state_channels(j);
    consumers_ = s_.consumers(j);
    const int64_t count = consumers_.size();
    filters_ = n * s_.taps * s_.growth;
    const int64_t affordable = std::max<int64_t>(1, (int64_t(1) << 24) / std::max<int64_t>(1, count * filters_));
    chunks_ = std::min(std::min(s_.tiling.count(), kConvChunks), affordable);
    packed_.resize(count * filters_);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) {
        const int64_t l = consumers_[k], at = s_.position(l, j);
        pack_transposed(t_.weight + s_.weight_offset(l), s_.growth, s_.layer_channels(l), s_.taps, T(s_.tau), at, at + n,
                        packed_.data() + k * filters_);
      }
    });
    dweight_.assign(chunks_ * count * filters_, T(0));
    sums_.assign(chunks_ * count * n * 2, 0.0);
    output_sums_.assign(chunks_ * n * 2, 0.0);
    bias_sums_.assign(kConvChunks * s_.growth, 0.0);
  }

  // D_j in tile i, and this tile's share of the parameters' gradients.
  void pull(int64_t j, int64_t chunk, int64_t i, Scratch& scratch) {
    const Tile tile = s_.tiling.tile(i);
    const FlatPlane& f = tile.flat;
    const int64_t length = f.length(), first = s_.state_first(j), channels = s_.state_channels(j);
    const int64_t count = consumers_.size(), stride = group_.length();
    int64_t *taps = scratch.take<int64_t>(s_.taps), *mirrored = scratch.take<int64_t>(s_.taps);
    tap_offsets(f, false, taps);
    tap_offsets(f, true, mirrored);
    T* mask = scratch.take<T>((1 + 5 * kConvGroup) * length) + f.origin();
    T *u = mask + length, *activated_u = u + kConvGroup * length, *own_slope = activated_u + kConvGroup * length;
    T *total = own_slope + kConvGroup * length, *extra = total + kConvGroup * length;
    fill_mask(tile, mask);

    const Activation act = s_.preactivation ? s_.activation : Activation::identity;
    const bool plain = act == Activation::identity && !sums_pairs();
    const T* value = plain ? u : activated_u;
    const T* slope = act == Activation::relu ? nullptr : act == Activation::identity ? mask : own_slope;
    const int64_t slope_stride = act == Activation::identity ? 0 : length;
    const bool whole = s_.tiling.whole();
    const bool centre = s_.preactivation && measures();
    for_each_group(channels, [&](int64_t c, int64_t n) {
      DNL_ISA_CALL(load_planes<T>(tile, at(states_, tile.image, first + c), n,
                                  centre ? centred_.scale.data() + first + c : nullptr,
                                  centre ? centred_.shift.data() + first + c : nullptr, Activation::identity, u));
      if (count == 0) std::fill(total - f.origin(), total - f.origin() + n * length, T(0));
      for (int64_t k = 0; k < count; k++) {
        const int64_t l = consumers_[k], pair = s_.channel_offset[l] + s_.position(l, j) + c;
        const T* scale = sums_pairs() ? prologue_.scale.data() + pair : nullptr;
        const T* shift = sums_pairs() ? prologue_.shift.data() + pair : nullptr;
        if (!plain)
          activate_tile(f, u, n, scale, shift, mask, act, activated_u, slope == own_slope ? own_slope : nullptr);
        const T* dy = gradient(l + 1, tile);
        const bool more = k + 1 < count && whole;
        const Ahead next = more ? Ahead{gradient(consumers_[k + 1] + 1, tile), s_.growth * stride * int64_t(sizeof(T))}
                                : Ahead{};
        double moment[2 * kConvGroup] = {};
        DNL_ISA_CALL(convolve_back<T>(f, dy, stride, s_.growth, mirrored, s_.taps,
                                      packed_.data() + k * filters_ + c * s_.growth * s_.taps, n, value, slope,
                                      slope_stride, u, scale, k > 0, total, sums_pairs() ? moment : nullptr, next));
        double* sum = sums_.data() + ((chunk * count + k) * channels + c) * 2;
        for (int64_t m = 0; m < n; m++) {
          sum[2 * m] += moment[m];
          sum[2 * m + 1] += moment[kConvGroup + m];
        }
        T* dw = dweight_.data() + (chunk * count + k) * filters_ + c * s_.taps * s_.growth;
        for_each_group(s_.growth, [&](int64_t o, int64_t outputs) {
          DNL_ISA_CALL(weight_gradient<T>(f, value, n, taps, s_.taps, dy + o * stride, stride, outputs, dw + o,
                                          s_.growth));
        });
      }
      if (activated(j)) through_activation(j, c, n, chunk, tile, mask, u, own_slope, activated_u, extra, total);
      for (int64_t m = 0; m < n; m++)
        std::copy(total + m * length, total + m * length + f.span(), gradient(j, tile) + (c + m) * stride);
    });
  }

  // total = (total + dOut_j) * act'(norm(y)), and the sums of the output's normalisation.
  void through_activation(int64_t j, int64_t c, int64_t n, int64_t chunk, const Tile& tile, const T* mask, T* yhat,
                          T* slope, T* value, T* dout, T* total) {
    const int64_t first = (j - 1) * s_.growth + c;
    const T* null = nullptr;
    DNL_ISA_CALL(load_planes<T>(tile, at(outputs_, tile.image, first), n, s_.norm ? centred_.scale.data() + first : null,
                                s_.norm ? centred_.shift.data() + first : null, Activation::identity, yhat));
    DNL_ISA_CALL(load_planes<T>(tile, at(dout_, tile.image, s_.state_first(j) + c), n, null, null,
                                Activation::identity, dout));
    activate_tile(tile.flat, yhat, n, t_.gamma ? t_.gamma + first : null, t_.beta ? t_.beta + first : null, mask,
                  s_.activation, value, slope);
    double moment[2 * kConvGroup] = {};
    DNL_ISA_CALL(apply_slope<T>(tile.flat, n, dout, slope, yhat, total, moment));
    double* sum = output_sums_.data() + (chunk * s_.growth + c) * 2;
    for (int64_t m = 0; m < n; m++) {
      sum[2 * m] += moment[m];
      sum[2 * m + 1] += moment[n + m];
    }
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
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sum(filters_);
      for (int64_t k = begin; k < end; k++) {
        const int64_t l = consumers_[k], at = s_.position(l, j), channels = s_.layer_channels(l);
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t chunk = 0; chunk < chunks_; chunk++) {
          const T* part = dweight_.data() + (chunk * count + k) * filters_;
          for (int64_t i = 0; i < filters_; i++) sum[i] += part[i];
        }
        T* dw = g_.weight + s_.weight_offset(l) + at * s_.taps;
        for (int64_t ct = 0; ct < n * s_.taps; ct++)
          for (int64_t o = 0; o < s_.growth; o++)
            dw[o * channels * s_.taps + ct] = static_cast<T>(sum[ct * s_.growth + o] * s_.tau);
      }
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

  void correct(int64_t j, int64_t chunk, int64_t i) {
    const Tile tile = s_.tiling.tile(i);
    const int64_t n = s_.state_channels(j);
    Planes<const T> x{nullptr, 0, 0}, dout{nullptr, 0, 0};
    if (corrects_ && s_.training)
      x = s_.preactivation ? at(states_, tile.image, s_.state_first(j)) : at(outputs_, tile.image, (j - 1) * s_.growth);
    if (!activated(j)) dout = at(dout_, tile.image, s_.state_first(j));
    T* planes = gradient(j, tile);
    double* sums = j > 0 && g_.bias ? bias_sums_.data() + chunk * s_.growth : nullptr;
    DNL_ISA_CALL(correct_planes<T>(tile, n, a_.data(), b_.data(), c_.data(), m_.data(), x, dout, planes,
                                   group_.length(), sums));
    if (j == 0)
      DNL_ISA_CALL(store_planes<T>(tile, planes, group_.length(), n, static_cast<const T*>(nullptr),
                                   at(g_.x0, tile.image, 0)));
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
  const FlatPlane group_;
  Folded<T> prologue_;  // of every pair: act's argument from what `pull` loads as u
  Folded<T> centred_;   // xhat from x, of every channel with statistics
  // Of the step at hand.
  std::vector<int64_t> consumers_;
  int64_t filters_ = 0, chunks_ = 0;
  std::vector<T> packed_, dweight_;
  std::vector<double> sums_, output_sums_, bias_sums_, mean_plain_, mean_moment_;
  std::vector<T> a_, b_, c_, m_;
  bool corrects_ = false;
};

}  // namespace dnl
