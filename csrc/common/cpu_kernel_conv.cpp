// Loops of common/conv.h. Vector lanes run over positions, register tiles over positions x outputs: no dependence on
// channel counts and no horizontal sums inside a loop.
#include "common/activation.h"
#include "common/conv.h"
#include "common/vec.h"

namespace dnl::DNL_ISA {
namespace {

// Vectors of positions in a tile of `outputs`: their product is the number of accumulators.
#if defined(__AVX512F__)
constexpr int kRegisters = 24;
constexpr int kStreams = 4;  // of weight_gradient: streams x outputs accumulators
#else
constexpr int kRegisters = 12;
constexpr int kStreams = 2;
#endif
constexpr int positions_per_tile(int outputs) { return kRegisters / outputs < 8 ? kRegisters / outputs : 8; }

// Calls body.template operator()<O>() for the O that equals `outputs`.
template <class Body>
DNL_INLINE void dispatch_outputs(int64_t outputs, Body body) {
  static_assert(kConvGroup == 6);
  switch (outputs) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    case 4: return body.template operator()<4>();
    case 5: return body.template operator()<5>();
    case 6: return body.template operator()<6>();
  }
}

// A zero that the compiler does not know: it would make calls of memset, which cost more than the padding of a row.
template <class T>
DNL_INLINE Vec<T> opaque_zero() {
  Vec<T> none{};
  DNL_IN_REGISTER(none);
  return none;
}

template <class T>
DNL_INLINE void zero(T* p, int64_t n) {
  const Vec<T> none = opaque_zero<T>();
  if (n < kLanes<T>) {
    for (int64_t i = 0; i < n; i++) p[i] = none[0];
    return;
  }
  for (int64_t i = 0; i + kLanes<T> < n; i += kLanes<T>) store(p + i, none);
  store(p + n - kLanes<T>, none);
}

// Spreads the cache lines of `Ahead` over the steps (tiles x channels) of a loop.
class Prefetcher {
 public:
  Prefetcher(Ahead ahead, int64_t steps)
      : next_(static_cast<const char*>(ahead.data)),
        end_(next_ + ahead.bytes),
        lines_((ahead.bytes / kLine + steps) / (steps > 0 ? steps : 1)) {}
  DNL_INLINE void step() {
    for (int64_t i = 0; i < lines_ && next_ < end_; i++, next_ += kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *next_, *end_;
  int64_t lines_;
};

// sum over channels and taps for V vectors of positions and O outputs
template <class T, int O, int V>
DNL_INLINE void accumulate_tile(const T* from, int64_t stride, int64_t channels, const int64_t* taps, int64_t tap_count,
                                const T* weight, Vec<T> (&sum)[O][V], Prefetcher& ahead) {
  for (int64_t c = 0; c < channels; c++, from += stride) {
    ahead.step();
    for (int64_t t = 0; t < tap_count; t++, weight += O) {
      const T* x = from + taps[t];
      Vec<T> in[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) in[v] = load(x + v * kLanes<T>);
#pragma GCC unroll 6
      for (int o = 0; o < O; o++) {
        const Vec<T> w = broadcast(weight[o]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[o][v] += in[v] * w;
      }
    }
  }
}

// Runs body.template operator()<V>(p) over all positions with the widest tiles that fit.
template <class T, int O, class Body>
DNL_INLINE void for_each_tile(int64_t span, Body body) {
  constexpr int V = positions_per_tile(O);
  constexpr int64_t lanes = kLanes<T>;
  const int64_t rounded = (span + lanes - 1) / lanes * lanes;
  int64_t p = 0;
  for (; p + V * lanes <= rounded; p += V * lanes) body.template operator()<V>(p);
  if constexpr (V > 2)
    for (; p + 2 * lanes <= rounded; p += 2 * lanes) body.template operator()<2>(p);
  for (; p < rounded; p += lanes) body.template operator()<1>(p);
}

// One row of pixels, then its padding on the right.
template <class T, ActivationKind A>
DNL_INLINE void load_row(const T* from, T* to, int64_t width, int64_t readable, int64_t radius, T scale, T shift,
                         T leak) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> s = broadcast(scale), h = broadcast(shift);
  const auto step = [&](int64_t x, Vec<T> in) {
    Vec<T> value, slope;
    activate<T, A>(in * s + h, leak, value, slope);
    store(to + x, value);  // may run into the next row, which is written later
  };
  int64_t x = 0;
  for (; x < width && x + lanes <= readable; x += lanes) step(x, load(from + x));
  if (x < width) step(x, load_partial(from + x, int(readable - x)));
  for (int64_t i = 0; i < radius; i += lanes) store(to + width + i, opaque_zero<T>());
}

}  // namespace

template <class T>
void load_planes(const Tile& tile, Planes<const T> from, int64_t channels, const T* scale, const T* shift,
                 Activation activation, T* to) {
  const FlatPlane& f = tile.flat;
  const int64_t r = f.radius, pitch = f.pitch(), width = f.width, area = tile.height * width;
  const int64_t top = tile.row - r > 0 ? tile.row - r : 0;
  const int64_t bottom = tile.row + f.rows + r < tile.height ? tile.row + f.rows + r : tile.height;
  dispatch_activation(activation.kind, [&]<ActivationKind A>() {
    for (int64_t c = 0; c < channels; c++, to += f.length()) {
      const T s = scale ? scale[c] : T(1), h = shift ? shift[c] : T(0);
      zero(to - f.origin(), f.origin());
      for (int64_t i = 0; i < f.images; i++) {
        const T* plane = from.data + i * from.image_stride + c * from.channel_stride;
        T* pixels = to + i * f.image() - tile.row * pitch;  // row y of the image at pixels + y * pitch
        for (int64_t y = top; y < bottom; y++)
          load_row<T, A>(plane + y * width, pixels + y * pitch, width, area - y * width, r, s, h, T(activation.leak));
        zero(pixels + bottom * pitch, (tile.row + f.rows + r - bottom) * pitch);
      }
      T* end = to + f.span() + f.halo();
      zero(end, (to - f.origin() + f.length()) - end);
    }
  });
}

template <class T>
void activate_run(const T* u, int64_t n, T scale, T shift, const T* mask, Activation activation, T* value, T* slope) {
  const Vec<T> s = broadcast(scale), h = broadcast(shift);
  const T leak = T(activation.leak);
  dispatch_activation(activation.kind, [&]<ActivationKind A>() {
    Vec<T> a, d;
    int64_t p = 0;
    for (; p + kLanes<T> <= n; p += kLanes<T>) {
      activate<T, A>(load(u + p) * s + h, leak, a, d);
      const Vec<T> m = mask ? load(mask + p) : broadcast(T(1));
      store(value + p, a * m);
      if (slope) store(slope + p, d * m);
    }
    if (const int left = int(n - p)) {
      activate<T, A>(load_partial(u + p, left) * s + h, leak, a, d);
      const Vec<T> m = mask ? load_partial(mask + p, left) : broadcast(T(1));
      store_partial(value + p, a * m, left);
      if (slope) store_partial(slope + p, d * m, left);
    }
  });
}

template <class T>
void convolve(const FlatPlane& f, Stack<const T> from, int64_t channels, const int64_t* taps, int64_t tap_count,
              const T* weight, int64_t outputs, const T* bias, bool accumulate, Stack<T> to, Ahead next) {
  const int64_t span = f.span();
  dispatch_outputs(outputs, [&]<int O>() {
    Prefetcher ahead(next, span / (positions_per_tile(O) * kLanes<T>) * channels);
    for_each_tile<T, O>(span, [&]<int V>(int64_t p) {
      Vec<T> sum[O][V] = {};
      accumulate_tile<T, O, V>(from.data + p, from.stride, channels, taps, tap_count, weight, sum, ahead);
#pragma GCC unroll 6
      for (int o = 0; o < O; o++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          T* out = to.data + o * to.stride + p + v * kLanes<T>;
          if (bias) sum[o][v] += broadcast(bias[o]);
          store(out, accumulate ? load(out) + sum[o][v] : sum[o][v]);
        }
    });
  });
}

template <class T>
void convolve_back(const FlatPlane& f, Stack<const T> from, int64_t channels, const int64_t* taps, int64_t tap_count,
                   const T* weight, int64_t outputs, Stack<const T> value, Stack<const T> slope, Stack<const T> u,
                   const T* scale, bool accumulate, Stack<T> total, double* sums) {
  const int64_t span = f.span();
  dispatch_outputs(outputs, [&]<int O>() {
    Prefetcher ahead(Ahead{}, 1);
    Vec<T> plain[O] = {}, moment[O] = {};
    for_each_tile<T, O>(span, [&]<int V>(int64_t p) {
      Vec<T> sum[O][V] = {};
      accumulate_tile<T, O, V>(from.data + p, from.stride, channels, taps, tap_count, weight, sum, ahead);
      const auto finish = [&]<bool kLast>() {
#pragma GCC unroll 6
        for (int o = 0; o < O; o++) {
          const Vec<T> s = broadcast(scale ? scale[o] : T(1));
          Vec<T> tile_plain{}, tile_moment{};
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) {
            const int64_t at = p + v * kLanes<T>;
            Vec<T> g = sum[o][v];
            if (slope.data)
              g *= load(slope.data + o * slope.stride + at);
            else
              g = load(value.data + o * value.stride + at) <= Vec<T>{} ? Vec<T>{} : g;
            if constexpr (kLast) g = first_lanes<T>(g, span - at);  // the pixels after the last belong to another tile
            tile_plain += g;
            tile_moment += g * load(u.data + o * u.stride + at);
            T* to = total.data + o * total.stride + at;
            store(to, accumulate ? load(to) + g * s : g * s);
          }
          plain[o] += tile_plain;
          moment[o] += tile_moment;
        }
      };
      if (p + V * kLanes<T> <= span)
        finish.template operator()<false>();
      else
        finish.template operator()<true>();
    });
    for (int o = 0; o < O; o++) {
      sums[o] += sum_lanes<T>(plain[o]);
      sums[kConvGroup + o] += sum_lanes<T>(moment[o]);
    }
  });
}

template <class T>
void weight_gradient(const FlatPlane& f, Stack<const T> value, int64_t channels, const int64_t* taps,
                     int64_t tap_count, Stack<const T> dy, int64_t outputs, T* gradient, int64_t row) {
  const int64_t span = f.span(), streams = channels * tap_count;
  dispatch_outputs(outputs, [&]<int O>() {
    const T* plane = value.data;  // of the next stream, and its tap
    int64_t tap = 0;
    const auto pass = [&]<int S>(int64_t first) {
      const T* x[S];
      for (int64_t i = 0; i < S; i++) {
        x[i] = plane + taps[tap];
        if (first + i + 1 >= streams) continue;  // the last pass repeats the last stream
        if (++tap == tap_count) {
          tap = 0;
          plane += value.stride;
        }
      }
      Vec<T> sum[S][O] = {};
      const auto step = [&](int64_t p, auto restrict_lanes) {
        Vec<T> in[S];
#pragma GCC unroll 4
        for (int i = 0; i < S; i++) in[i] = load(x[i] + p);
#pragma GCC unroll 6
        for (int o = 0; o < O; o++) {
          Vec<T> g = restrict_lanes(load(dy.data + o * dy.stride + p));
          DNL_IN_REGISTER(g);  // loads are as scarce as multiplications here: not once more for each stream
#pragma GCC unroll 4
          for (int i = 0; i < S; i++) sum[i][o] += in[i] * g;
        }
      };
      int64_t p = 0;
      for (; p + kLanes<T> <= span; p += kLanes<T>) step(p, [](Vec<T> g) { return g; });
      if (p < span) step(p, [&](Vec<T> g) { return first_lanes<T>(g, span - p); });
#pragma GCC unroll 4
      for (int i = 0; i < S; i++) {
        if (first + i >= streams) break;
#pragma GCC unroll 6
        for (int o = 0; o < O; o++) gradient[(first + i) * row + o] += sum_lanes<T>(sum[i][o]);
      }
    };
    int64_t first = 0;
    for (; first + kStreams / 2 < streams; first += kStreams) pass.template operator()<kStreams>(first);
    for (; first < streams; first += kStreams / 2) pass.template operator()<kStreams / 2>(first);
  });
}

template <class T>
void store_planes(const Tile& tile, Stack<const T> from, int64_t channels, Planes<T> to) {
  const FlatPlane& f = tile.flat;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t size = f.rows * f.width;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = 0; i < f.images; i++) {
      const T* pixels = from.data + c * from.stride + i * f.image();
      T* out = to.data + i * to.image_stride + c * to.channel_stride + tile.row * f.width;
      for (int64_t y = 0; y < f.rows; y++)
        for (int64_t x = 0; x < f.width; x += lanes) {
          const int64_t at = y * f.width + x;
          const Vec<T> v = load(pixels + y * f.pitch() + x);
          // A whole vector may run into the next row, which is written later, but not out of the tile.
          if (at + lanes <= size)
            store(out + at, v);
          else
            store_partial(out + at, v, int(size - at));
        }
    }
}

template <class T>
void add_planes(const Tile& tile, Stack<const T> from, int64_t channels, Planes<T> to) {
  const FlatPlane& f = tile.flat;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = 0; i < f.images; i++) {
      const T* pixels = from.data + c * from.stride + i * f.image();
      T* out = to.data + i * to.image_stride + c * to.channel_stride + tile.row * f.width;
      for (int64_t y = 0; y < f.rows; y++, pixels += f.pitch(), out += f.width) {
        int64_t x = 0;
        for (; x + lanes <= f.width; x += lanes) store(out + x, load(out + x) + load(pixels + x));
        for (; x < f.width; x++) out[x] += pixels[x];
      }
    }
}

template <class T>
void activate_back_run(const T* dvalue, const T* u, int64_t n, T scale, T shift, T centre, Activation activation,
                       bool accumulate, T* total, double* sums) {
  const Vec<T> s = broadcast(scale), h = broadcast(shift), m = broadcast(centre);
  const T leak = T(activation.leak);
  dispatch_activation(activation.kind, [&]<ActivationKind A>() {
    Vec<T> plain{}, moment{};
    const auto step = [&](Vec<T> g, Vec<T> x, Vec<T> before) {
      Vec<T> value, slope;
      activate<T, A>(x * s + h, leak, value, slope);
      g *= slope;
      plain += g;
      moment += g * (x - m);
      return before + g * s;
    };
    const Vec<T> zero{};
    int64_t p = 0;
    for (; p + kLanes<T> <= n; p += kLanes<T>)
      store(total + p, step(load(dvalue + p), load(u + p), accumulate ? load(total + p) : zero));
    if (const int left = int(n - p)) {
      const Vec<T> before = accumulate ? load_partial(total + p, left) : zero;
      store_partial(total + p, step(load_partial(dvalue + p, left), load_partial(u + p, left), before), left);
    }
    sums[0] += sum_lanes<T>(plain);
    sums[1] += sum_lanes<T>(moment);
  });
}

template <class T>
void pool_plane(const T* from, int64_t height, int64_t width, int64_t rows, int64_t columns, T* to) {
  const int64_t pairs = width / 2;
  for (int64_t y = 0; y < rows; y++, to += columns) {
    // A row or a column that is alone counts twice.
    const T *above = from + 2 * y * width, *below = 2 * y + 1 < height ? above + width : above, share = T(0.25);
    for (int64_t x = 0; x < pairs; x++)
      to[x] = share * ((above[2 * x] + above[2 * x + 1]) + (below[2 * x] + below[2 * x + 1]));
    if (columns > pairs) to[pairs] = T(0.5) * (above[width - 1] + below[width - 1]);
  }
}

template <class T>
void unpool_plane(const T* from, int64_t height, int64_t width, int64_t rows, int64_t columns, T* to) {
  const int64_t pairs = width / 2;
  for (int64_t y = 0; y < height; y++, to += width) {
    const bool pooled = y / 2 < rows, alone = y % 2 == 0 && y + 1 == height;
    const T* row = from + y / 2 * columns;
    const T share = alone ? T(0.5) : T(0.25);
    for (int64_t x = 0; x < pairs; x++) to[2 * x] = to[2 * x + 1] = pooled ? share * row[x] : T(0);
    if (width % 2) to[width - 1] = pooled && columns > pairs ? 2 * share * row[pairs] : T(0);
  }
}

template <class T>
void correct_run(const T* x, int64_t n, T rate, T centre, T constant, T* total) {
  for (int64_t p = 0; p < n; p++) total[p] += rate * (x[p] - centre) + constant;
}

template <class T>
void moments(const T* x, int64_t n, double* mean, double* deviations) {
  constexpr int64_t lanes = kLanes<T>;
  const auto total = [&](auto term) {
    Vec<T> s0{}, s1{};
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      s0 += term(load(x + i));
      s1 += term(load(x + i + lanes));
    }
    double sum = sum_lanes<T>(s0 + s1);
    for (; i < n; i++) sum += term(broadcast(x[i]))[0];
    return sum;
  };
  *mean = n ? total([](Vec<T> v) { return v; }) / n : 0.0;
  const Vec<T> m = broadcast(T(*mean));
  *deviations = total([&](Vec<T> v) { return (v - m) * (v - m); });
}

#define DNL_INSTANTIATE(T)                                                                                             \
  template void load_planes<T>(const Tile&, Planes<const T>, int64_t, const T*, const T*, Activation, T*);             \
  template void activate_run<T>(const T*, int64_t, T, T, const T*, Activation, T*, T*);                                \
  template void convolve<T>(const FlatPlane&, Stack<const T>, int64_t, const int64_t*, int64_t, const T*, int64_t,      \
                            const T*, bool, Stack<T>, Ahead);                                                          \
  template void convolve_back<T>(const FlatPlane&, Stack<const T>, int64_t, const int64_t*, int64_t, const T*, int64_t, \
                                 Stack<const T>, Stack<const T>, Stack<const T>, const T*, bool, Stack<T>, double*);   \
  template void weight_gradient<T>(const FlatPlane&, Stack<const T>, int64_t, const int64_t*, int64_t, Stack<const T>, \
                                   int64_t, T*, int64_t);                                                              \
  template void store_planes<T>(const Tile&, Stack<const T>, int64_t, Planes<T>);                                      \
  template void add_planes<T>(const Tile&, Stack<const T>, int64_t, Planes<T>);                                        \
  template void activate_back_run<T>(const T*, const T*, int64_t, T, T, T, Activation, bool, T*, double*);             \
  template void pool_plane<T>(const T*, int64_t, int64_t, int64_t, int64_t, T*);                                                       \
  template void unpool_plane<T>(const T*, int64_t, int64_t, int64_t, int64_t, T*);                                                     \
  template void correct_run<T>(const T*, int64_t, T, T, T, T*);                                                        \
  template void moments<T>(const T*, int64_t, double*, double*);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
