// Convolutions on flat planes: what dense_conv2d and dnl_block share.
//
// A flat plane holds one channel of a tile (some whole images end to end, or some rows of one image) with its zero
// padding: rows are `pitch` = width + radius apart, so that the padding to the right of a row is also the padding to
// the left of the next one, and images are `radius` zero rows apart. A tap (dy, dx) of a k x k filter is then the fixed
// offset dy * pitch + dx, and every loop runs over `span` consecutive positions, whatever the width: small maps fill
// the vector lanes as well as large ones. Positions in the padding are computed too (3 % of a 32 x 32 map) and ignored.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace dnl {

enum class ActivationKind : int { identity, relu, leaky_relu, tanh, gelu, silu };

// A function of one number; `leak`, the slope below 0, is leaky_relu's.
struct Activation {
  ActivationKind kind;
  double leak;
};
constexpr Activation kIdentity{ActivationKind::identity, 0};

constexpr int64_t kConvGroup = 6;        // output channels of one register tile; growth rates 6 and 12 fill it
constexpr int64_t kTilePositions = 1024;  // a few planes of a tile fit in the first-level cache
constexpr int64_t kFewPositions = 256;
constexpr int64_t kPlaneAlign = 16;      // elements

struct FlatPlane {
  int64_t images, rows, width, radius;
  int64_t above = radius;  // rows of padding

  int64_t pitch() const { return width + radius; }
  int64_t image() const { return (rows + above) * pitch(); }
  int64_t span() const { return (images - 1) * image() + (rows - 1) * pitch() + width; }
  int64_t halo() const { return above * pitch() + radius; }
  // Position 0, the first pixel, lies here; planes begin on multiples of kPlaneAlign and are `length` apart.
  int64_t origin() const { return round_up(halo()); }
  int64_t length() const { return round_up(origin() + round_up(span()) + halo() + kPlaneAlign); }

 private:
  static int64_t round_up(int64_t n) { return (n + kPlaneAlign - 1) / kPlaneAlign * kPlaneAlign; }
};

// Planes of a tensor as they lie in memory: rows dense within a plane.
template <class T>
struct Planes {
  T* data;  // of the tile's first image, row 0 of the image
  int64_t image_stride, channel_stride;
};

// Flat planes `stride` apart, each from position 0: of a scratch, or of a tensor where they need no padding.
template <class T>
struct Stack {
  T* data;
  int64_t stride;

  Stack plane(int64_t i) const { return {data + i * stride, stride}; }
  Stack<const T> read() const { return {data, stride}; }
};

// A tile: images [image, image + flat.images), rows [row, row + flat.rows) of `height`.
struct Tile {
  FlatPlane flat;
  int64_t image, row, height;
};

// How a batch is cut into tiles: a function of its sizes alone, never of the number of threads.
struct Tiling {
  int64_t batch, height, width, radius;
  int64_t images;  // whole images per tile, or 1 where an image is cut
  int64_t rows;    // rows per tile

  Tiling(int64_t batch, int64_t height, int64_t width, int64_t radius)
      : batch(batch), height(height), width(width), radius(radius), images(1), rows(height) {
    const int64_t pixels = height * width;
    if (pixels == 0 || batch == 0) return;
    if (pixels < kTilePositions) {
      // As many images as fit, but at least eight tiles; at least two where the images are so small that a tile of
      // fewer than kFewPositions would spend its time on starting and ending loops.
      const int64_t fitting = kTilePositions / pixels, few = (kFewPositions + pixels - 1) / pixels;
      const int64_t eighth = (batch + 7) / 8, half = (batch + 1) / 2, least = few < half ? few : half;
      const int64_t wanted = eighth > least ? eighth : least;
      images = fitting < wanted ? fitting : wanted;
    } else {
      const int64_t bands = (pixels + kTilePositions * 5 / 4 - 1) / (kTilePositions * 5 / 4);
      rows = (height + bands - 1) / bands;
    }
  }
  int64_t groups() const { return batch == 0 ? 0 : (batch + images - 1) / images; }
  int64_t bands() const { return rows == 0 ? 0 : (height + rows - 1) / rows; }
  int64_t count() const { return width == 0 ? 0 : groups() * bands(); }
  bool whole() const { return rows == height; }
  Tile tile(int64_t i) const {
    const int64_t image = i / bands() * images, row = i % bands() * rows;
    const int64_t n = batch - image < images ? batch - image : images, r = height - row < rows ? height - row : rows;
    return {{n, r, width, radius}, image, row, height};
  }
  FlatPlane largest() const { return {images, rows, width, radius}; }
};

// The offsets of a k x k filter's taps, row by row; `mirrored` for the transposed convolution.
inline void tap_offsets(const FlatPlane& f, bool mirrored, int64_t* offsets) {
  for (int64_t dy = -f.above; dy <= f.above; dy++)
    for (int64_t dx = -f.radius; dx <= f.radius; dx++) *offsets++ = (mirrored ? -1 : 1) * (dy * f.pitch() + dx);
}

// Memory that a loop asks for ahead of time, a little with every channel, since its reader comes next.
struct Ahead {
  const void* data = nullptr;
  int64_t bytes = 0;

  Ahead share(int64_t k, int64_t count) const {
    const int64_t begin = bytes * k / count, end = bytes * (k + 1) / count;
    return {static_cast<const char*>(data) + begin, end - begin};
  }
};

// All pointers to flat planes below point at position 0 of their first plane.
#define DNL_DECLARE_CONV(LEVEL)                                                                                     \
  namespace LEVEL {                                                                                                 \
  /* to = act(scale_c * from + shift_c), with zero padding; scale == nullptr: act(from) */                          \
  template <class T>                                                                                                \
  void load_planes(const Tile&, Planes<const T> from, int64_t channels, const T* scale, const T* shift, Activation, \
                   T* to);                                                                                          \
  /* value = mask * act(scale * u + shift), slope = mask * act'(...) for n numbers; mask and slope may be nullptr */   \
  template <class T>                                                                                                \
  void activate_run(const T* u, int64_t n, T scale, T shift, const T* mask, Activation, T* value, T* slope);        \
  /* to_o (+)= sum_c sum_t from_c[. + taps_t] * weight[c, t, o] + bias_o (nullptr: 0), o < outputs <= kConvGroup */ \
  template <class T>                                                                                                \
  void convolve(const FlatPlane&, Stack<const T> from, int64_t channels, const int64_t* taps, int64_t tap_count,    \
                const T* weight, int64_t outputs, const T* bias, bool accumulate, Stack<T> to, Ahead);              \
  /* With q the same sums, without bias: v = q * slope; total_o (+)= scale_o * v; sums[o] += sum v, */               \
  /* sums[kConvGroup + o] += sum v u. No slope.data: v = q where value > 0, else 0 (relu). */                     \
  template <class T>                                                                                                \
  void convolve_back(const FlatPlane&, Stack<const T> from, int64_t channels, const int64_t* taps,                  \
                     int64_t tap_count, const T* weight, int64_t outputs, Stack<const T> value,                     \
                     Stack<const T> slope, Stack<const T> u, const T* scale, bool accumulate, Stack<T> total,       \
                     double* sums);                                                                                 \
  /* gradient[c, t, o] += sum_p value_c[p + taps_t] * dy_o[p], o < outputs <= kConvGroup, rows `row` elements apart */ \
  template <class T>                                                                                                \
  void weight_gradient(const FlatPlane&, Stack<const T> value, int64_t channels, const int64_t* taps,               \
                       int64_t tap_count, Stack<const T> dy, int64_t outputs, T* gradient, int64_t row);            \
  /* to = from for the pixels of the tile */                                                                        \
  template <class T>                                                                                                \
  void store_planes(const Tile&, Stack<const T> from, int64_t channels, Planes<T> to);                              \
  /* to += from for the pixels of the tile */                                                                       \
  template <class T>                                                                                                \
  void add_planes(const Tile&, Stack<const T> from, int64_t channels, Planes<T> to);                                \
  /* g = dvalue * act'(scale * u + shift) for n numbers: total (+)= scale * g; sums += sum g, sum g * (u - centre) */    \
  template <class T>                                                                                                \
  void activate_back_run(const T* dvalue, const T* u, int64_t n, T scale, T shift, T centre, Activation,            \
                         bool accumulate, T* total, double* sums);                                                  \
  /* rows * columns means of 2 x 2 pixels of a plane; at the end of an odd side, of those that there are */         \
  template <class T>                                                                                                \
  void pool_plane(const T* from, int64_t height, int64_t width, int64_t rows, int64_t columns, T* to);              \
  /* its transpose: every pixel's share of the mean that it is in, 0 in none */                                     \
  template <class T>                                                                                                \
  void unpool_plane(const T* from, int64_t height, int64_t width, int64_t rows, int64_t columns, T* to);            \
  /* total += rate * (x - centre) + constant for n numbers */                                                       \
  template <class T>                                                                                                \
  void correct_run(const T* x, int64_t n, T rate, T centre, T constant, T* total);                                  \
  /* mean and sum of squared deviations of n numbers; their sum in double */                                        \
  template <class T>                                                                                                \
  void moments(const T* x, int64_t n, double* mean, double* deviations);                                            \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_CONV)

}  // namespace dnl
