// A DenseNet's transition in evaluation: y = W mean_2x2(act(scale * x + shift)) + bias, pooled first; the pooling behind
// its stem; and that in front of its classifier. One pass: pixels are normalised, activated and pooled while a panel of
// them is loaded for the product.
#pragma once
#include <cstdint>

#include "common/conv.h"

namespace dnl {

constexpr int64_t kTransitionBlock = 16;  // outputs are filled up to whole blocks
constexpr int64_t kTransitionPanel = 48;  // pixels of a task at most
constexpr int64_t kTransitionDepth = 96;  // channels of a panel, which has one more row for stores that run over

template <class T>
struct Transition {
  const T* x;  // [batch, channels, height, width], dense planes
  int64_t image_stride, channel_stride, channels, height, width;
  bool pool;
  const T *scale, *shift;  // [channels]
  const T* weight;         // [outputs / 16][channels][16]
  const T* bias;           // [outputs]
  int64_t outputs, padded;
  T* y;  // [batch, outputs, rows(), columns()]
  Activation activation;

  int64_t rows() const { return pool ? height / 2 : height; }
  int64_t columns() const { return pool ? width / 2 : width; }
};

#define DNL_DECLARE_TRANSITION(LEVEL)                                                                          \
  namespace LEVEL {                                                                                            \
  /* outputs of pixels [first, first + count), count <= kTransitionPanel */                                    \
  template <class T>                                                                                           \
  void transition_pixels(const Transition<T>&, int64_t first, int64_t count, T* panel, T* products);           \
  /* to = the maxima of act(scale * x + shift) over 3 x 3 pixels, 2 apart, the first around pixel 0; row: width + */ \
  /* 5 * 16 elements */                                                                                        \
  template <class T>                                                                                           \
  void max_pool_plane(const T* x, int64_t height, int64_t width, T scale, T shift, Activation, T* row, T* to);  \
  /* to[0] = the mean of act(scale * x + shift) over so many pixels, added up in float64 but for short pieces */ \
  template <class T>                                                                                           \
  void mean_plane(const T* x, int64_t pixels, T scale, T shift, Activation, T* to);                            \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_TRANSITION)

}  // namespace dnl
