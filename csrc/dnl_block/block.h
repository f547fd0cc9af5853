// The block as the C++ code sees it: sizes, who reads what, and where it lies in the flat parameter vectors.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/conv_host.h"
#include "common/winograd_host.h"
#include "dnl_block/params.h"

namespace dnl {

struct Span {
  int64_t first, channels;  // of the states buffer
};

// What is static in dnl_block (BlockConfig) for kernel = "local" and a convolution without bottleneck.
struct BlockShape {
  int64_t batch, in_channels, height, width, layers, growth, size, taps;
  bool preactivation, norm, training;
  Activation activation;
  double tau, eps;
  std::vector<std::vector<int64_t>> reads;      // of each layer: the states that it reads, in order
  std::vector<int64_t> channel_offset;          // of each layer in norm vectors over all pairs; layers + 1 entries
  Tiling tiling;

  int64_t channels() const { return in_channels + layers * growth; }
  int64_t state_first(int64_t j) const { return j ? in_channels + (j - 1) * growth : 0; }
  int64_t state_channels(int64_t j) const { return j ? growth : in_channels; }
  int64_t layer_channels(int64_t l) const { return channel_offset[l + 1] - channel_offset[l]; }
  int64_t weight_offset(int64_t l) const { return channel_offset[l] * growth * taps; }
  Form form() const { return form_of(tiling.radius); }
  // Of a layer's transformed filters, and of one state's share of them.
  int64_t packed_offset(int64_t l) const { return channel_offset[l] * filter_size(); }
  int64_t filter_size() const { return growth * form().parts * form().taps; }
  // Planes of parts of whole images.
  FlatPlane gradient_plane() const { return grouped({tiling.images, height, width, tiling.radius}); }
  int64_t gradient_size() const { return form().parts * gradient_plane().length(); }
  // Whether layers are computed one by one, in the form of common/winograd.h, and whether they are backward too.
  bool wide() const { return is_wide(size, in_channels, growth); }
  bool wide_backward() const { return wide() && !norm; }
  int64_t elements() const { return batch * height * width; }
  // Where a norm has statistics: of every state (preactivation), else of every layer's output.
  int64_t statistics() const { return preactivation ? channels() : layers * growth; }

  // The channels that layer l reads, neighbouring states joined.
  std::vector<Span> spans(int64_t l) const {
    std::vector<Span> found;
    for (int64_t j : reads[l]) {
      const Span s{state_first(j), state_channels(j)};
      if (!found.empty() && found.back().first + found.back().channels == s.first)
        found.back().channels += s.channels;
      else
        found.push_back(s);
    }
    return found;
  }
  // Where state j begins among the channels that layer l reads, or -1.
  int64_t position(int64_t l, int64_t j) const {
    int64_t at = 0;
    for (int64_t i : reads[l]) {
      if (i == j) return at;
      at += state_channels(i);
    }
    return -1;
  }
  std::vector<int64_t> consumers(int64_t j) const {
    std::vector<int64_t> found;
    for (int64_t l = j; l < layers; l++)
      if (position(l, j) >= 0) found.push_back(l);
    return found;
  }
};

// Statistics of a channel from those of its parts, in a fixed order.
struct Moments {
  double count = 0, mean = 0, deviations = 0;

  void add(double n, double m, double d) {
    if (n == 0) return;
    const double total = count + n, delta = m - mean;
    deviations += d + delta * delta * count * n / total;
    mean += delta * n / total;
    count = total;
  }
};

// The flat tensors of a block; a member is absent where the configuration has none.
template <class T>
struct BlockTensors {
  const T* weight;                       // [layers][growth, C(l), k, k]
  const T *bias;                         // [layers, growth]
  const T *gamma, *beta;                 // preactivation: [layers][C(l)], else [layers, growth]
  const T *mean, *var;                   // as gamma (given statistics), or [statistics()] (of this batch)
};

// G w of filters [D, C, taps]: [parts][D, C, taps along the width].
template <class T>
std::vector<T> transform_filters(const T* weight, int64_t filters, Form form) {
  if (form.parts == 1) return {weight, weight + filters};
  std::vector<T> found(form.parts * filters * form.taps);
  T* to = found.data();
  for (int64_t k = 0; k < form.parts; k++) {
    const double* g = kFilterTransform[k];
    for (const T* w = weight; w < weight + filters * 9; w += 9)
      for (int64_t t = 0; t < 3; t++) *to++ = static_cast<T>(g[0] * w[t] + g[1] * w[3 + t] + g[2] * w[6 + t]);
  }
  return found;
}

// G^T g, g of [parts][C, taps along the width, D]: [C, taps, D].
inline std::vector<double> untransform_filters(const std::vector<double>& g, int64_t channels, int64_t outputs,
                                               Form form) {
  if (form.parts == 1) return g;
  std::vector<double> found(channels * 9 * outputs);
  const double* from = g.data();
  for (int64_t k = 0; k < form.parts; k++)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t t = 0; t < 3; t++, from += outputs)
        for (int64_t r = 0; r < 3; r++)
          for (int64_t o = 0; o < outputs; o++)
            found[((c * 3 + r) * 3 + t) * outputs + o] += kFilterTransform[k][r] * from[o];
  return found;
}

// act(scale * x + shift) for every pair of layer and channel read (preactivation) or every output: the normalisation
// with its statistics folded in.
template <class T>
struct Folded {
  std::vector<T> scale, shift;

  void resize(int64_t n) {
    scale.resize(n);
    shift.resize(n);
  }
  void set(int64_t i, double mean, double var, double eps, const T* gamma, const T* beta) {
    const double s = (gamma ? double(gamma[i]) : 1.0) / std::sqrt(var + eps);
    scale[i] = static_cast<T>(s);
    shift[i] = static_cast<T>((beta ? double(beta[i]) : 0.0) - mean * s);
  }
};

}  // namespace dnl
