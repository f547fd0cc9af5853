// Loops of params.h.
#include "common/panel.h"
#include "transition/params.h"

namespace dnl::DNL_ISA {
namespace {

static_assert(kTransitionBlock == kOutputBlock && kTransitionPanel == kPanelPixels && kTransitionDepth == kPanelDepth);

// The larger of two numbers, NaN where one of them is.
template <class T>
DNL_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  const Vec<T> known = a > b ? a : b;
  return a == a ? known : a;
}

}  // namespace

template <class T>
void transition_pixels(const Transition<T>& t, int64_t first, int64_t count, T* panel, T* products) {
  Run runs[kPanelPixels];
  int64_t rows[kPanelPixels];
  int run_count = 0;
  const int64_t columns = t.columns(), area = t.rows() * columns;
  for (int64_t p = 0; p < count;) {  // pooled: pixels of one row
    const int64_t image = (first + p) / area, at = (first + p) % area, left = t.pool ? columns - at % columns : area - at;
    const int64_t n = left < count - p ? left : count - p;
    const int64_t from = t.pool ? at / columns * 2 * t.width + at % columns * 2 : at;
    runs[run_count++] = {image * t.image_stride + from, int(p), int(n)};
    p += n;
  }
  for (int64_t p = 0; p < count; p++) rows[p] = p * t.padded;

  const T leak = T(t.activation.leak);
  const int64_t parts = (t.channels + kPanelDepth - 1) / kPanelDepth;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t from = part * t.channels / parts, depth = (part + 1) * t.channels / parts - from;
    const T* x = t.x + from * t.channel_stride;
    dispatch_activation(t.activation.kind, [&]<ActivationKind A>() {
      if (!t.pool)
        return load_panel<T, A>(x, t.channel_stride, depth, t.scale + from, t.shift + from, runs, run_count, leak, panel);
      for (int64_t c = 0; c < depth; c++)
        for (int r = 0; r < run_count; r++)
          pool_run<T, A>(x + c * t.channel_stride + runs[r].from, t.width, runs[r].count, t.scale[from + c],
                         t.shift[from + c], leak, panel + c * kPanelPixels + runs[r].to);
    });
    const Product<T> p{panel,    1,    0,      depth,    t.weight + from * kOutputBlock, t.channels * kOutputBlock,
                       products, rows, t.bias, part > 0, T(-__builtin_inf())};
    product<T, kPanelPixels, 1>(p, count, 0, t.padded / kOutputBlock);
  }
  for (int64_t p = 0; p < count;) {
    const int64_t image = (first + p) / area, at = (first + p) % area, n = area - at < count - p ? area - at : count - p;
    store_channels_first(products + p * t.padded, t.padded, n, t.outputs, t.y + image * t.outputs * area + at, area);
    p += n;
  }
}

template <class T>
void max_pool_plane(const T* x, int64_t height, int64_t width, T scale, T shift, Activation activation, T* row, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> s = broadcast(scale), h = broadcast(shift), none = broadcast(T(-__builtin_inf()));
  const int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
  IntVec<T> even;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++) even[i] = 2 * i;
  const T leak = T(activation.leak);
  T* middle = row + kOutputBlock;
  store(middle - lanes, none);
  dispatch_activation(activation.kind, [&]<ActivationKind A>() {
    for (int64_t y = 0; y < rows; y++, to += columns) {
      const T* at = x + 2 * y * width;
      const bool above = y > 0, below = 2 * y + 1 < height;
      for (int64_t c = 0; c < width; c += lanes) {
        const int n = int(width - c < lanes ? width - c : lanes);
        const auto read = [&](const T* from) {
          Vec<T> value, slope;
          activate<T, A>((n == lanes ? load(from + c) : load_partial(from + c, n)) * s + h, leak, value, slope);
          return value;
        };
        Vec<T> most = read(at);
        if (above) most = larger<T>(most, read(at - width));
        if (below) most = larger<T>(most, read(at + width));
        if (n < lanes) most = lane_numbers<T>() < typename IntOf<sizeof(T)>::type(n) ? most : none;
        store(middle + c, most);
      }
      const int64_t end = (width + lanes - 1) / lanes * lanes;
      store(middle + end, none);
      store(middle + end + lanes, none);
      for (int64_t c = 0; c < columns; c += lanes) {
        const T* from = middle + 2 * c;
        const auto pick = [&](const T* p) {
#if defined(__clang__)
          Vec<T> v;
          for (int i = 0; i < lanes; i++) v[i] = p[2 * i];
          return v;
#else
          return __builtin_shuffle(load(p), load(p + lanes), even);
#endif
        };
        const Vec<T> most = larger<T>(larger<T>(pick(from - 1), pick(from)), pick(from + 1));
        store_partial(to + c, most, int(columns - c < lanes ? columns - c : lanes));
      }
    }
  });
}

template <class T>
void mean_plane(const T* x, int64_t pixels, T scale, T shift, Activation activation, T* to) {
  constexpr int64_t lanes = kLanes<T>, piece = 64 * lanes;
  const Vec<T> s = broadcast(scale), h = broadcast(shift);
  const T leak = T(activation.leak);
  double total = 0;
  dispatch_activation(activation.kind, [&]<ActivationKind A>() {
    for (int64_t from = 0; from < pixels; from += piece) {
      const int64_t end = from + piece < pixels ? from + piece : pixels;
      Vec<T> sum{}, value, slope;
      int64_t i = from;
      for (; i + lanes <= end; i += lanes) {
        activate<T, A>(load(x + i) * s + h, leak, value, slope);
        sum += value;
      }
      if (i < end) {
        activate<T, A>(load_partial(x + i, int(end - i)) * s + h, leak, value, slope);
        sum += first_lanes<T>(value, end - i);
      }
      total += double(sum_lanes<T>(sum));
    }
  });
  *to = T(total / double(pixels));
}

#define DNL_INSTANTIATE(T)                                                                         \
  template void transition_pixels<T>(const Transition<T>&, int64_t, int64_t, T*, T*);              \
  template void max_pool_plane<T>(const T*, int64_t, int64_t, T, T, Activation, T*, T*);             \
  template void mean_plane<T>(const T*, int64_t, T, T, Activation, T*);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
