// Pixels of channels-first images on their way into a product and out of it: panels of activated numbers, and results
// with their channels in the vector lanes. Included by cpu_kernel files only.
#pragma once
#include "common/activation.h"
#include "common/product.h"

namespace dnl::DNL_ISA {

constexpr int64_t kPanelPixels = 48;  // of a row of a panel
constexpr int64_t kPanelDepth = 96;   // channels of a panel: with the weights of 64 outputs in the first cache

// Consecutive pixels of one image: where they lie in a channel of the states, and in a row of the panel.
struct Run {
  int64_t from;
  int to, count;
};

// panel[c][p] = act(scale_c * x_c[p] + shift_c) for the channels of a span, rows kPitch apart. A store may run into the
// next run or row, which is written later.
template <class T, ActivationKind A, int64_t kPitch = kPanelPixels>
DNL_INLINE void load_panel(const T* x, int64_t channel_stride, int64_t channels, const T* scale, const T* shift,
                           const Run* runs, int run_count, T leak, T* panel) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < channels; c++, x += channel_stride, panel += kPitch) {
    const Vec<T> s = broadcast(scale[c]), h = broadcast(shift[c]);
    for (int r = 0; r < run_count; r++) {
      const T* from = x + runs[r].from;
      T* to = panel + runs[r].to;
      Vec<T> value, slope;
      int i = 0;
      for (; i + lanes <= runs[r].count; i += lanes) {
        activate<T, A>(load(from + i) * s + h, leak, value, slope);
        store(to + i, value);
      }
      if (i < runs[r].count) {
        activate<T, A>(load_partial(from + i, runs[r].count - i) * s + h, leak, value, slope);
        store(to + i, value);
      }
    }
  }
}

// to_o[x] = pixels[x][o] for x < width, o < outputs
template <class T>
DNL_INLINE void store_channels_first(const T* pixels, int64_t growth, int64_t width, int64_t outputs, T* to,
                                     int64_t channel_stride) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t x = 0; x < width; x += lanes)
    for (int64_t o = 0; o < outputs; o += lanes) {
      Vec<T> rows[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) rows[i] = load(pixels + (x + i) * growth + o);
      transpose<T>(rows);
      T* out = to + o * channel_stride + x;
      if (x + lanes <= width && o + lanes <= outputs) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) store(out + i * channel_stride, rows[i]);
        continue;
      }
      const int left = int(width - x < lanes ? width - x : lanes);
      const int64_t rest = outputs - o < lanes ? outputs - o : lanes;
      for (int64_t i = 0; i < rest; i++) store_partial(out + i * channel_stride, rows[i], left);
    }
}

// to[p] = the mean of act(scale * x + shift) over 2 x 2 pixels, the first
// of which lie at `from` and 2 apart, in rows `width` apart.
template <class T, ActivationKind A>
DNL_INLINE void pool_run(const T* from, int64_t width, int count, T scale, T shift, T leak, T* to) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> s = broadcast(scale), h = broadcast(shift), quarter = broadcast(T(0.25));
  IntVec<T> even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  for (int p = 0; p < count; p += lanes) {
    const int numbers = 2 * (count - p < lanes ? count - p : lanes);
    Vec<T> sum[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const int n = numbers - half * lanes < 0 ? 0 : numbers - half * lanes < lanes ? numbers - half * lanes : lanes;
      Vec<T> above, below, slope;
      const T* x = from + 2 * p + half * lanes;
      activate<T, A>((n == lanes ? load(x) : load_partial(x, n)) * s + h, leak, above, slope);
      activate<T, A>((n == lanes ? load(x + width) : load_partial(x + width, n)) * s + h, leak, below, slope);
      sum[half] = above + below;
    }
#if defined(__clang__)
    Vec<T> mean;
    for (int i = 0; i < lanes; i++) mean[i] = sum[2 * i / lanes][2 * i % lanes] + sum[2 * i / lanes][2 * i % lanes + 1];
#else
    const Vec<T> mean = __builtin_shuffle(sum[0], sum[1], even) + __builtin_shuffle(sum[0], sum[1], odd);
#endif
    store(to + p, mean * quarter);
  }
}

}  // namespace dnl::DNL_ISA
