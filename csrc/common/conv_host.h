// What the cpu.cpp files of convolutions share: planes of torch tensors, groups of channels, packed filters.
#pragma once
#include <locale>
#include <sstream>
#include <string>
#include <vector>

#include "common/conv.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/torch.h"

namespace dnl {

// Input channels loaded at a time: few enough to stay in cache while the outputs pass by, many enough taps that loading
// and storing the outputs is small next to them.
inline int64_t conv_block(int64_t taps) { return taps == 1 ? 48 : 12; }
constexpr int64_t kConvChunks = 32;  // partial weight gradients: a number that does not depend on the threads

// From what dnl_kernels/_activations.py has checked: a kind, or "leaky_relu(0.2)".
inline Activation activation_of(const std::string& name) {
  static const char* const kinds[] = {"identity", "relu", "leaky_relu", "tanh", "gelu", "silu"};
  Activation found{ActivationKind::identity, 0.01};
  const size_t open = name.find('(');
  if (open != std::string::npos) {
    std::istringstream number(name.substr(open + 1));
    number.imbue(std::locale::classic());  // a decimal point, whatever the process's language
    DNL_CHECK(number >> found.leak && number.get() == ')', "activation ", name);
  }
  for (int i = 0; i < 6; i++)
    if (name.substr(0, open) == kinds[i]) {
      found.kind = static_cast<ActivationKind>(i);
      return found;
    }
  DNL_CHECK(false, "unknown activation ", name);
  return found;
}

// Whether the rows of each plane are dense, as they are in a slice of channels.
inline bool has_dense_planes(const Tensor& t) {
  return (t.size(3) <= 1 || t.stride(3) == 1) && (t.size(2) <= 1 || t.stride(2) == t.size(3));
}

// The tensor itself where its planes are dense, and no half type; else a copy.
inline Tensor with_dense_planes(const Tensor& t) {
  return !is_half(t.scalar_type()) && has_dense_planes(t) ? t : widened(t);
}

template <class T>
Planes<T> planes_of(const Tensor& t) {
  return {elements_of<T>(t), t.stride(0), t.stride(1)};
}
template <class T>
Planes<T> at(Planes<T> p, int64_t image, int64_t channel) {
  return {p.data + image * p.image_stride + channel * p.channel_stride, p.image_stride, p.channel_stride};
}
template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? elements_of<const T>(*t) : nullptr;
}

// Calls body(first, size) for groups of at most kConvGroup channels, as equal as can be.
template <class Body>
void for_each_group(int64_t channels, Body body) {
  const int64_t count = (channels + kConvGroup - 1) / kConvGroup;
  for (int64_t i = 0, first = 0; i < count; i++) {
    const int64_t size = channels / count + (i < channels % count);
    body(first, size);
    first += size;
  }
}

// Filters [D, C, taps] scaled and regrouped as `convolve` reads them: for each group of outputs [C, taps, size].
template <class T>
void pack_filters(const T* weight, int64_t outputs, int64_t channels, int64_t taps, T scale, T* packed) {
  for_each_group(outputs, [&](int64_t first, int64_t size) {
    for (int64_t c = 0; c < channels; c++)
      for (int64_t t = 0; t < taps; t++)
        for (int64_t o = first; o < first + size; o++) *packed++ = weight[(o * channels + c) * taps + t] * scale;
  });
}

// The same for the transposed convolution, over input channels [begin, end): for each group of them [D, taps, size].
template <class T>
void pack_transposed(const T* weight, int64_t outputs, int64_t channels, int64_t taps, T scale, int64_t begin,
                     int64_t end, T* packed) {
  for_each_group(end - begin, [&](int64_t first, int64_t size) {
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t t = 0; t < taps; t++)
        for (int64_t c = begin + first; c < begin + first + size; c++)
          *packed++ = weight[(o * channels + c) * taps + t] * scale;
  });
}

// 1 at the pixels of the tile and of its neighbours in the same image, 0 in the padding.
template <class T>
void fill_mask(const Tile& tile, T* mask) {
  const FlatPlane& f = tile.flat;
  for (int64_t p = -f.origin(); p < f.length() - f.origin(); p++) mask[p] = T(0);
  for (int64_t i = 0; i < f.images; i++)
    for (int64_t y = -f.radius; y < f.rows + f.radius; y++)
      if (tile.row + y >= 0 && tile.row + y < tile.height)
        for (int64_t x = 0; x < f.width; x++) mask[i * f.image() + y * f.pitch() + x] = T(1);
}

// value = mask * act(scale_c * u + shift_c) and its slope (nullptr: unwanted) over whole flat planes, or, without a mask,
// over their pixels; scale and shift may be nullptr.
template <class T>
void activate_tile(const FlatPlane& f, Stack<const T> u, int64_t channels, const T* scale, const T* shift,
                   const T* mask, Activation activation, T* value, T* slope) {
  const int64_t before = mask ? f.origin() : 0, n = mask ? f.length() : f.span();
  for (int64_t c = 0; c < channels; c++) {
    const int64_t at = c * f.length() - before;
    const T a = scale ? scale[c] : T(1), b = shift ? shift[c] : T(0);
    DNL_ISA_CALL(activate_run<T>(u.data + c * u.stride - before, n, a, b, mask ? mask - before : nullptr, activation,
                                 value + at, slope ? slope + at : nullptr));
  }
}

// Runs body(chunk, begin, end) for `chunks` equal shares of [0, count), in parallel.
template <class Body>
void parallel_chunks(int64_t chunks, int64_t count, Body body) {
  parallel_tasks(0, chunks, 1, [&](int64_t c, int64_t) { body(c, c * count / chunks, (c + 1) * count / chunks); });
}

}  // namespace dnl
