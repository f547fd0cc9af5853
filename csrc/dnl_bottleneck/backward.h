// The backward pass of a training step of a bottleneck block, from the last layer to the first. Included by cpu.cpp.
#pragma once
#include "dnl_bottleneck/training.h"

namespace dnl {
namespace {

// A copy of dstates into `total`, and the packing of all weights; then for each layer the gradient of its outputs,
// contract's backward, the statistics of y and the filters' gradient, expand's backward, and the statistics of what it
// reads with its weight's gradient; dx0 at last.
template <class T>
class TrainingBackward {
 public:
  TrainingBackward(const Step& step, Planes<const T> dstates, const T* states, const T* inner, Measured<const T> outer,
                   Measured<const T> inner_measured, T* dx0, const std::vector<T*>& gradients)
      : s_(step), b_(step.block), maps_(step.maps), dstates_(dstates), states_(states), inner_(inner), outer_(outer),
        inner_measured_(inner_measured), dx0_(dx0), gradients_(gradients) {
    const int64_t pixels = s_.pixels, tiles = maps_.tiles(), wide = b_.padded_wide;
    of_d_ = {s_.batch, s_.height, s_.width, maps_.image_stride, b_.padded_growth, b_.padded_growth};
    tile_chunks_ = std::clamp<int64_t>(tiles / (4 * kBackwardTiles), 1, kMostChunks);
    pixel_chunks_ = std::clamp<int64_t>(pixels / (8 * kBackwardPanel), 1, kMostChunks);
    pieces_ = std::max<int64_t>(1, maps_.pixels() / kGradientPixels);
    int64_t widest = 0;
    for (int64_t l = 0; l < s_.layers(); l++) {
      const int64_t channels = b_.layers[l].channels;
      widest = std::max(widest, channels);
      reads_.push_back(channels_of(b_.layers[l]));
      weights_.push_back(place(round_up(channels, kBottleneckBlock) * wide));
      filters_.push_back(place(kWinogradPoints * wide * b_.padded_growth));
    }
    total_ = place(s_.batch * maps_.image_stride);
    d_ = place(s_.batch * of_d_.image());
    g_ = place(pixels * wide);
    filter_size_ = kWinogradPoints * wide * b_.padded_growth;
    filter_partial_ = place(tile_chunks_ * filter_size_);
    weight_size_ = widest * wide;
    weight_partial_ = place(pixel_chunks_ * weight_size_);
    vectors_.resize(5 * wide);
    scale_.resize(widest);
    shift_.resize(widest);
    mean_.resize(widest);
    rate_.resize(widest);
    plain_.resize(b_.channels());
    moment_.resize(b_.channels());
    inner_sums_.resize(tile_chunks_ * 2 * wide);
    bias_sums_.resize(pixel_chunks_ * wide);
    sums_.resize(pixel_chunks_ * 2 * widest);
  }
  int64_t room() const { return room_size_; }

  void run(T* room) {
    room_ = room;
    threads_ = free_threads();
    struct Own {
      Scratch scratch;
      ContractBackward<T> contract;
      ExpandBackward<T> expand;
    };
    const int64_t wide_tiles = kWinogradPoints * (kBackwardTiles * kBackwardBlocks + 1) * kBottleneckBlock;
    const int64_t panel = (kBackwardDepth + 1) * kBackwardPanel, dy = kBackwardPanel * b_.padded_wide;
    const int64_t products = (kBottleneckBlock + 1) * kBackwardPanel, gradients = of_d_.transformed(kBackwardTiles);
    const auto prepare = [&] {
      int64_t bytes = 0;
      for (int64_t size : {gradients, gradients, wide_tiles, wide_tiles}) bytes += Scratch::bytes<T>(size);
      int64_t others = 0;
      for (int64_t size : {panel, dy, dy, products}) others += Scratch::bytes<T>(size);
      Own own{Scratch(bytes + others), {}, {}};
      const auto take = [&](int64_t size) { return own.scratch.template take<T>(size); };
      own.contract = {take(gradients), take(gradients), take(wide_tiles), take(wide_tiles), nullptr, nullptr};
      own.expand = {take(panel), take(dy), take(dy), take(products), nullptr, nullptr, nullptr};
      return own;
    };
    const int64_t tile_shares = shares_of(tile_chunks_, s_.wide_blocks(), threads_);
    const auto blocks_of = [&](int64_t l) {
      return (b_.layers[l].channels + kBottleneckBlock - 1) / kBottleneckBlock;
    };
    const auto layer_at = [&](int64_t phase) { return s_.layers() - 1 - (phase - 1) / kSteps; };
    const auto count = [&](int64_t phase) -> int64_t {
      if (phase == 0) return b_.channels() + s_.batch + 2 * s_.layers() * s_.wide_blocks();
      if (phase == 1 + kSteps * s_.layers()) return b_.in_channels;
      const int64_t blocks = blocks_of(layer_at(phase)), shares = shares_of(pixel_chunks_, blocks, threads_);
      const int64_t counts[] = {s_.batch * pieces_, tile_chunks_ * tile_shares, s_.wide_blocks(),
                                pixel_chunks_ * shares, blocks};
      return counts[(phase - 1) % kSteps];
    };
    parallel_phases(2 + kSteps * s_.layers(), prepare, count, [&](int64_t phase, int64_t task, Own& own) {
      if (phase == 0) return start(task);
      if (phase == 1 + kSteps * s_.layers()) return finish(task);
      const int64_t l = layer_at(phase), step = (phase - 1) % kSteps;
      if (step == 0) load_gradient(l, task);
      if (step == 1) contract(l, task / tile_shares, task % tile_shares, tile_shares, own.contract);
      if (step == 2) finish_contract(l, task);
      const int64_t blocks = blocks_of(l), shares = shares_of(pixel_chunks_, blocks, threads_);
      if (step == 3) expand(l, task / shares, share(task % shares, shares, blocks),
                            share(task % shares + 1, shares, blocks), own.expand);
      if (step == 4) finish_expand(l, task);
    });
  }

 private:
  static constexpr int64_t kSteps = 5, kMostChunks = 8, kGradientPixels = 512;
  enum Gradient { kOfWeight, kOfBias, kOfGamma, kOfBeta, kOfInnerWeight, kOfInnerGamma, kOfInnerBeta, kGradients };

  int64_t place(int64_t size) {
    const int64_t at = room_size_;
    room_size_ += round_up(size, kBottleneckBlock);
    return at;
  }
  T* gradient(int64_t l, Gradient name) const { return gradients_[l * kGradients + name]; }
  double share_of_a_number() const { return s_.pixels ? 1.0 / s_.pixels : 0; }
  Measured<const T> inner_of(int64_t l) const {
    return {inner_measured_.mean + l * b_.wide, inner_measured_.var + l * b_.wide};
  }
  BottleneckBackward<T> layer_of(int64_t l) const {
    const int64_t wide = b_.padded_wide;
    const T* v = vectors_.data();
    return {inner_ + l * s_.pixels * wide, room_ + g_, {v, v + wide, v + 2 * wide}, v + 3 * wide, v + 4 * wide,
            room_ + filters_[l], b_.growth, b_.channel_of(l), reads_[l].data(), b_.layers[l].channels,
            scale_.data(), shift_.data(), mean_.data(), room_ + weights_[l], s_.activation};
  }
  // What the statistics of the batch take from a channel's gradient: total + rate * (x - mean) + constant.
  void correction(int64_t channel, T* rate, T* mean, T* constant) const {
    const double r = s_.rate(outer_.var[channel]);
    *rate = static_cast<T>(-r * r * moment_[channel]);
    *mean = outer_.mean[channel];
    *constant = static_cast<T>(-r * plain_[channel]);
  }

  void start(int64_t task) {
    if (task < b_.channels()) {
      for (int64_t image = 0; image < s_.batch; image++) {
        const T* from = at(dstates_, image, task).data;
        std::copy(from, from + maps_.pixels(), room_ + total_ + image * maps_.image_stride + task * maps_.pixels());
      }
      return;
    }
    task -= b_.channels();
    if (task < s_.batch) {
      T* image = room_ + d_ + task * of_d_.image();
      std::fill(image, image + of_d_.image(), T(0));
      return;
    }
    task -= s_.batch;
    const int64_t each = 2 * s_.wide_blocks(), l = task / each, i = task % each / 2, n = kBottleneckBlock;
    if (task % 2 == 0) {
      DNL_ISA_CALL(pack_winograd<T>(elements_of<const T>(s_.filters[l]), b_.growth, b_.wide, true, i, i + 1,
                                    b_.padded_growth, b_.padded_wide, room_ + filters_[l]));
      return;
    }
    const int64_t channels = b_.layers[l].channels, end = std::min((i + 1) * n, b_.wide);
    DNL_ISA_CALL(pack_columns<T>(elements_of<const T>(s_.weights[l]), channels, T(s_.tau), i * n, end, b_.padded_wide,
                                 room_ + weights_[l]));
    for (int64_t c = 0; c < channels; c += n)
      std::fill(room_ + weights_[l] + c * b_.padded_wide + end * n,
                room_ + weights_[l] + c * b_.padded_wide + (i + 1) * n * n, T(0));
  }

  // Of the layer's outputs; and what the layer's tasks need of its normalisations, by the first of these.
  void load_gradient(int64_t l, int64_t task) {
    if (task == 0) {
      for (int64_t c = 0; c < b_.layers[l].channels; c++) {
        const Affine a = affine_of(s_, s_.outer[l], c, outer_, reads_[l][c]);
        scale_[c] = static_cast<T>(a.scale);
        shift_[c] = static_cast<T>(a.shift);
        mean_[c] = static_cast<T>(a.mean);
        rate_[c] = a.rate;
      }
      for (int64_t o = 0; o < b_.padded_wide; o++) {
        const Affine a = o < b_.wide ? affine_of(s_, s_.inner[l], o, inner_of(l), o) : Affine{0, 0, 0, 0};
        vectors_[o] = static_cast<T>(a.scale);
        vectors_[b_.padded_wide + o] = static_cast<T>(a.shift);
        vectors_[2 * b_.padded_wide + o] = static_cast<T>(a.mean);
      }
    }
    std::vector<T> corrections(3 * b_.growth);
    T *rate = corrections.data(), *mean = rate + b_.growth, *constant = mean + b_.growth;
    for (int64_t o = 0; o < b_.growth && s_.measures; o++)
      correction(b_.channel_of(l) + o, rate + o, mean + o, constant + o);
    const int64_t image = task / pieces_, first = share(task % pieces_, pieces_, maps_.pixels());
    const int64_t place = image * maps_.image_stride + b_.channel_of(l) * maps_.pixels();
    DNL_ISA_CALL(bottleneck_gradient<T>(of_d_, room_ + total_ + place, states_ + place, b_.growth,
                                        s_.measures ? rate : nullptr, mean, constant, first,
                                        share(task % pieces_ + 1, pieces_, maps_.pixels()) - first,
                                        room_ + d_ + image * of_d_.image()));
  }

  void contract(int64_t l, int64_t chunk, int64_t part, int64_t shares, ContractBackward<T> work) {
    const int64_t begin = share(part, shares, s_.wide_blocks()), end = share(part + 1, shares, s_.wide_blocks());
    const int64_t first = share(chunk, tile_chunks_, maps_.tiles()), last = share(chunk + 1, tile_chunks_, maps_.tiles());
    work.filters = room_ + filter_partial_ + chunk * filter_size_;
    work.sums = inner_sums_.data() + chunk * 2 * b_.padded_wide;
    for (int64_t i = 0; i < 2; i++)
      std::fill(work.sums + i * b_.padded_wide + begin * kBottleneckBlock,
                work.sums + i * b_.padded_wide + end * kBottleneckBlock, 0.0);
    const int64_t pieces = (last - first + kBackwardTiles - 1) / kBackwardTiles;
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t tile = first + share(i, pieces, last - first), n = first + share(i + 1, pieces, last - first) - tile;
      DNL_ISA_CALL(bottleneck_contract_backward<T>(maps_, layer_of(l), room_ + d_, tile, n, begin, end, i > 0, work,
                                                   room_ + g_));
    }
  }

  void finish_contract(int64_t l, int64_t block) {
    const int64_t begin = block * kBottleneckBlock, end = std::min(begin + kBottleneckBlock, b_.wide);
    const int64_t wide = b_.padded_wide;
    T *rate = vectors_.data() + 3 * wide, *constant = rate + wide;
    std::fill(rate + begin, rate + begin + kBottleneckBlock, T(0));
    std::fill(constant + begin, constant + begin + kBottleneckBlock, T(0));
    for (int64_t o = begin; o < end; o++) {
      double plain = 0, moment = 0;
      for (int64_t chunk = 0; chunk < tile_chunks_; chunk++) {
        plain += inner_sums_[chunk * 2 * wide + o];
        moment += inner_sums_[(chunk * 2 + 1) * wide + o];
      }
      const Affine a = affine_of(s_, s_.inner[l], o, inner_of(l), o);
      if (T* to = gradient(l, kOfInnerGamma)) to[o] = static_cast<T>(moment * a.rate);
      if (T* to = gradient(l, kOfInnerBeta)) to[o] = static_cast<T>(plain);
      if (!s_.measures) continue;
      rate[o] = static_cast<T>(-a.scale * share_of_a_number() * a.rate * a.rate * moment);
      constant[o] = static_cast<T>(-a.scale * share_of_a_number() * plain);
    }
    DNL_ISA_CALL(bottleneck_filter_gradient<T>(room_ + filter_partial_, tile_chunks_, filter_size_, b_.padded_growth,
                                               wide, b_.growth, b_.wide, begin, begin + kBottleneckBlock,
                                               gradient(l, kOfInnerWeight)));
  }

  void expand(int64_t l, int64_t chunk, int64_t begin, int64_t end, ExpandBackward<T> work) {
    const int64_t channels = b_.layers[l].channels, past = std::min(end * kBottleneckBlock, channels);
    work.weight = room_ + weight_partial_ + chunk * weight_size_;
    work.sums = sums_.data() + chunk * 2 * channels;
    for (int64_t i = 0; i < 2; i++)
      std::fill(work.sums + i * channels + begin * kBottleneckBlock, work.sums + i * channels + past, 0.0);
    if (begin == 0 && gradient(l, kOfBias)) {
      work.bias = bias_sums_.data() + chunk * b_.padded_wide;
      std::fill(work.bias, work.bias + b_.padded_wide, 0.0);
    }
    const int64_t first = share(chunk, pixel_chunks_, s_.pixels), last = share(chunk + 1, pixel_chunks_, s_.pixels);
    for (int64_t pixel = first; pixel < last; pixel += kBackwardPanel)
      DNL_ISA_CALL(bottleneck_expand_backward<T>(maps_, layer_of(l), states_, pixel,
                                                 std::min(kBackwardPanel, last - pixel), begin, end, pixel > first, work,
                                                 room_ + total_));
  }

  void finish_expand(int64_t l, int64_t block) {
    const int64_t channels = b_.layers[l].channels;
    const int64_t begin = block * kBottleneckBlock, end = std::min(begin + kBottleneckBlock, channels);
    for (int64_t c = begin; c < end; c++) {
      double plain = 0, moment = 0;
      for (int64_t chunk = 0; chunk < pixel_chunks_; chunk++) {
        plain += sums_[chunk * 2 * channels + c];
        moment += sums_[(chunk * 2 + 1) * channels + c];
      }
      moment *= rate_[c];
      if (T* to = gradient(l, kOfGamma)) to[c] = static_cast<T>(moment);
      if (T* to = gradient(l, kOfBeta)) to[c] = static_cast<T>(plain);
      plain_[reads_[l][c]] += s_.outer[l].gamma[c] * plain * share_of_a_number();
      moment_[reads_[l][c]] += s_.outer[l].gamma[c] * moment * share_of_a_number();
    }
    DNL_ISA_CALL(bottleneck_weight_gradient<T>(room_ + weight_partial_, pixel_chunks_, weight_size_, b_.padded_wide,
                                               b_.wide, channels, T(s_.tau), begin, end, gradient(l, kOfWeight)));
    T* const bias = block == 0 ? gradient(l, kOfBias) : nullptr;
    for (int64_t o = 0; o < b_.wide && bias; o++) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < pixel_chunks_; chunk++) sum += bias_sums_[chunk * b_.padded_wide + o];
      bias[o] = static_cast<T>(sum);
    }
  }

  void finish(int64_t channel) {
    T rate = 0, mean = 0, constant = 0;
    if (s_.measures) correction(channel, &rate, &mean, &constant);
    for (int64_t image = 0; image < s_.batch; image++) {
      const int64_t place = image * maps_.image_stride + channel * maps_.pixels(), n = maps_.pixels();
      T* to = dx0_ + (image * b_.in_channels + channel) * n;
      std::copy(room_ + total_ + place, room_ + total_ + place + n, to);
      if (s_.measures) DNL_ISA_CALL(correct_run<T>(states_ + place, n, rate, mean, constant, to));
    }
  }

  const Step& s_;
  const Block& b_;
  BottleneckMaps maps_, of_d_;
  Planes<const T> dstates_;
  const T *states_, *inner_;
  Measured<const T> outer_, inner_measured_;
  T *dx0_, *room_ = nullptr;
  const std::vector<T*>& gradients_;
  int64_t tile_chunks_, pixel_chunks_, pieces_, threads_ = 1, room_size_ = 0;
  int64_t total_, d_, g_, filter_partial_, filter_size_, weight_partial_, weight_size_;
  std::vector<int64_t> weights_, filters_;  // where they lie in the room
  std::vector<std::vector<int64_t>> reads_;
  std::vector<T> vectors_, scale_, shift_, mean_;
  std::vector<double> rate_, plain_, moment_;  // of what the layer reads; sums of every channel of the states
  std::vector<double> inner_sums_, bias_sums_, sums_;
};

}  // namespace
}  // namespace dnl
