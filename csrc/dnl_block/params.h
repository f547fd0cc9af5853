// Between csrc/dnl_block/cpu.cpp and its loops: 3 x 3 convolutions in Winograd's form F(4, 3) along the rows.
//
// The four outputs y_i = sum_k w_k d_{i+k} of a column take 12 products; as polynomials known at 0, +-3/4, +-3/2 and
// infinity they take 6:  y = A^T ((G w) .* (B^T d)). Transposed, with the same G w: the gradient of d is
// B ((G w) .* (A dy)), and that of w is G^T ((A dy) .* (B^T d)). So a tile holds, for every channel and for each of six
// parts, one number per column and group of four rows, and the convolutions along the width (taps -1, 0, 1) are those of
// common/conv.h. A 1 x 1 filter is the same with one part and groups of one row. The points are small binary fractions:
// the matrices are exact, and errors those of a direct convolution (up to 1.5 times for few channels, less for many).
//
// Planes of parts are flat (conv.h) without rows of padding between images: `above` is 0.
#pragma once
#include "common/conv.h"
#include "common/winograd.h"

namespace dnl {

constexpr int64_t kMostParts = 6;

// Rows per group, parts, and taps along the width of a filter of radius 0 or 1.
struct Form {
  int64_t rows, parts, taps;
};
constexpr Form form_of(int64_t radius) { return radius ? Form{4, 6, 3} : Form{1, 1, 1}; }

// The planes of parts of a tile of `f.images` images and `f.rows` rows.
inline FlatPlane grouped(const FlatPlane& f) {
  const int64_t rows = form_of(f.radius).rows;
  return {f.images, (f.rows + rows - 1) / rows, f.width, f.radius, 0};
}

// The planes of parts that hold the gradient of some channels: planes of a part are `part` apart, channels `channel`.
template <class T>
struct Parts {
  T* data;
  int64_t part, channel;
};

// Tiles come with the pointers to their first image's row 0, or to the position 0 of their planes of parts.
#define DNL_DECLARE_BLOCK(LEVEL)                                                                                      \
  namespace LEVEL {                                                                                                   \
  /* zeros around the images in planes of parts of so many channels, for `gather`, which leaves them as they are */   \
  template <class T>                                                                                                  \
  void clear_padding(const Tile&, int64_t channels, T* to);                                                           \
  /* to = B^T act(scale_c * from + shift_c) at the pixels of the tile; scale == nullptr: act(from) */                 \
  template <class T>                                                                                                  \
  void gather(const Tile&, Planes<const T> from, int64_t channels, const T* scale, const T* shift, Activation, T* to); \
  /* to = A^T products + shift_c (nullptr: 0) at the pixels of the tile */                                            \
  template <class T>                                                                                                  \
  void scatter(const Tile&, Parts<const T> products, int64_t channels, const T* shift, Planes<T> to);                 \
  /* g = act'(scale_c x + shift_c) * (B products)_c, and total_c (+)= factor_c g, in rows instead of parts; */        \
  /* sums[2 c] += sum g, sums[2 c + 1] += sum g * (rate_c x + offset_c). Absent vectors are ones and zeros; sums may be */ \
  /* nullptr. `lead`, `trail`: the groups of products in front of and behind those of the tile. */                    \
  template <class T>                                                                                                  \
  void pull(const Tile&, Parts<const T> products, int64_t lead, int64_t trail, int64_t channels, Planes<const T> x,   \
            const T* scale, const T* shift, Activation, const T* rate, const T* offset, const T* factor,              \
            bool accumulate, Parts<T> total, double* sums);                                                           \
  /* total = act'(scale_c yhat + shift_c) * (total + dout), yhat = rate_c y + offset_c, in rows; */                    \
  /* sums[2 c] += sum of it, sums[2 c + 1] += sum of it * yhat */                                                     \
  template <class T>                                                                                                  \
  void through(const Tile&, int64_t channels, Planes<const T> y, Planes<const T> dout, const T* scale, const T* shift, \
               Activation, const T* rate, const T* offset, Parts<T> total, double* sums);                             \
  /* g = a_c * total + b_c * (x - m_c) + c_c + dout at the pixels of the tile, into `to`, or A g in place of total, */ \
  /* with zeros next to it; x.data, dout.data and sums may be nullptr; sums[c] += sum g */                            \
  template <class T>                                                                                                  \
  void correct(const Tile&, int64_t channels, const T* a, const T* b, const T* c, const T* m, Planes<const T> x,      \
               Planes<const T> dout, Parts<T> total, Planes<T> to, double* sums);                                     \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_BLOCK)

}  // namespace dnl
