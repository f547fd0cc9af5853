// Loops of params.h: packing for a training step, and its backward pass.
#include "common/vec.h"
#include "dnl_bottleneck/params.h"
#include "dnl_bottleneck/tiles.h"

namespace dnl::DNL_ISA {
namespace {

constexpr int64_t n16 = kOutputBlock;

template <class T>
constexpr T kNoFloor = T(-__builtin_inf());

}  // namespace

template <class T>
void pack_rows(const T* from, int64_t rows, int64_t columns, T factor, int64_t begin, int64_t end, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> f = broadcast(factor);
  for (int64_t block = begin; block < end; block++)
    for (int64_t i = 0; i < n16; i += lanes)
      for (int64_t c = 0; c < columns; c += lanes) {
        const int left = int(columns - c < lanes ? columns - c : lanes);
        Vec<T> square[lanes];
#pragma GCC unroll 16
        for (int64_t j = 0; j < lanes; j++) {
          const int64_t row = block * n16 + i + j;
          const T* p = from + row * columns + c;
          square[j] = row >= rows ? Vec<T>{} : (left == lanes ? load(p) : load_partial(p, left)) * f;
        }
        transpose<T>(square);
        T* out = to + (block * columns + c) * n16 + i;
        for (int j = 0; j < left; j++) store(out + j * n16, square[j]);
      }
}

template <class T>
void pack_columns(const T* from, int64_t columns, T factor, int64_t begin, int64_t end, int64_t rows, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> f = broadcast(factor);
  for (int64_t r = begin; r < end; r++)
    for (int64_t c = 0; c < columns; c += n16)
      for (int64_t i = 0; i < n16; i += lanes) {
        const int64_t left = columns - c - i < 0 ? 0 : columns - c - i;
        const T* p = from + r * columns + c + i;
        const Vec<T> v = left >= lanes ? load(p) : left ? load_partial(p, int(left)) : Vec<T>{};
        store(to + (c * rows + r * n16) + i, v * f);
      }
}

template <class T>
void pack_winograd(const T* from, int64_t outputs, int64_t channels, bool turned, int64_t begin, int64_t end,
                   int64_t padded_out, int64_t padded_in, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  // Lanes are outputs, or turned channels, of the convolution that reads them; depth is the other one.
  const int64_t lane_count = turned ? channels : outputs, depth = turned ? outputs : channels;
  const int64_t lane_step = turned ? 9 : channels * 9, depth_step = turned ? channels * 9 : 9;
  const int64_t padded = turned ? padded_out : padded_in, point = padded_out * padded_in;
  const Vec<T> half = broadcast(T(0.5));
  for (int64_t block = begin; block < end; block++)
    for (int64_t k = 0; k < padded; k++) {
      T* out = to + (block * padded + k) * n16;
      alignas(64) T w[9][n16];
      for (int64_t i = 0; i < n16; i++) {
        const bool present = k < depth && block * n16 + i < lane_count;
        const T* p = from + k * depth_step + (block * n16 + i) * lane_step;
        for (int t = 0; t < 9; t++) w[t][i] = present ? p[turned ? 8 - t : t] : T(0);
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < n16; i += lanes) {
        const auto transform = [&](Vec<T> a, Vec<T> b, Vec<T> c, Vec<T>* u, int step) __attribute__((always_inline)) {
          const Vec<T> outer = a + c;
          u[0] = a;
          u[step] = (outer + b) * half;
          u[2 * step] = (outer - b) * half;
          u[3 * step] = c;
        };
        Vec<T> g[4][3], u[4][4];
#pragma GCC unroll 3
        for (int x = 0; x < 3; x++) transform(load(w[x] + i), load(w[3 + x] + i), load(w[6 + x] + i), &g[0][x], 3);
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) transform(g[y][0], g[y][1], g[y][2], u[y], 1);
#pragma GCC unroll 16
        for (int p = 0; p < kWinogradPoints; p++) store(out + p * point + i, u[p / 4][p % 4]);
      }
    }
}

template <class T>
void bottleneck_gradient(const BottleneckMaps& maps, const T* total, const T* states, int64_t outputs, const T* rate,
                         const T* mean, const T* constant, int64_t first, int64_t count, T* d) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t area = maps.pixels(), width = maps.width;
  int64_t y = first / width, x = first % width;
  for (int64_t p = first; p < first + count; p += lanes) {
    const int left = int(first + count - p < lanes ? first + count - p : lanes);
    T* to[lanes];
    for (int i = 0; i < left; i++) {
      to[i] = d + (y + 1) * maps.row() + (x + 1) * maps.wide;
      if (++x == width) x = 0, y++;
    }
    for (int64_t o = 0; o < maps.wide; o += lanes) {
      Vec<T> square[lanes];
      for (int64_t i = 0; i < lanes; i++) {
        square[i] = Vec<T>{};
        if (o + i >= outputs) continue;
        const T *from = total + (o + i) * area + p, *state = states + (o + i) * area + p;
        square[i] = left == lanes ? load(from) : load_partial(from, left);
        if (rate)
          square[i] += broadcast(rate[o + i]) *
                           ((left == lanes ? load(state) : load_partial(state, left)) - broadcast(mean[o + i])) +
                       broadcast(constant[o + i]);
      }
      transpose<T>(square);
      for (int i = 0; i < left; i++) store(to[i] + o, square[i]);
    }
  }
}

namespace {

// dz through the activation: g of the tiles' pixels, and its sums.
template <class T, ActivationKind A>
void finish_contract_backward(const BottleneckMaps& maps, const BottleneckBackward<T>& layer, int64_t first,
                              int64_t count, int64_t begin, int64_t width, const T* products, int64_t point_stride,
                              double* sums, T* g) {
  constexpr int64_t kMost = kBackwardBlocks * n16;
  const int64_t columns = maps.tile_columns(), per_image = maps.tile_rows() * columns;
  const T leak = T(layer.activation.leak);
  alignas(64) T plain[kMost] = {}, moment[kMost] = {};
  for (int64_t t = 0; t < count; t++) {
    const int64_t tile = first + t, at = tile % per_image, y = at / columns * 2, x = at % columns * 2;
    const int64_t pixel = ((tile / per_image) * maps.height + y) * maps.width + x;
    const bool inside[4] = {true, x + 1 < maps.width, y + 1 < maps.height, x + 1 < maps.width && y + 1 < maps.height};
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> dz[2][2], p = load(plain + c), m = load(moment + c);
      output_tile<T>(products + t * width + c, point_stride, dz);
      const Vec<T> scale = load(layer.inner.scale + begin + c), shift = load(layer.inner.shift + begin + c);
      const Vec<T> mean = load(layer.inner.mean + begin + c);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        if (!inside[i]) continue;
        const int64_t place = (pixel + i / 2 * maps.width + i % 2) * maps.wide + begin + c;
        const Vec<T> value = load(layer.y + place);
        Vec<T> activated, slope;
        activate<T, A>(value * scale + shift, leak, activated, slope);
        const Vec<T> through = dz[i / 2][i % 2] * slope;
        store(g + place, through);
        p += through;
        m += through * (value - mean);
      }
      store(plain + c, p);
      store(moment + c, m);
    }
  }
  for (int64_t c = 0; c < width; c++) {
    sums[begin + c] += plain[c];
    sums[maps.wide + begin + c] += moment[c];
  }
}

}  // namespace

template <class T>
void bottleneck_contract_backward(const BottleneckMaps& maps, const BottleneckBackward<T>& layer, const T* d,
                                  int64_t first, int64_t count, int64_t begin, int64_t end, bool accumulate,
                                  const ContractBackward<T>& work, T* g) {
  const int64_t columns = maps.tile_columns(), per_image = maps.tile_rows() * columns, growth = maps.growth;
  const BottleneckMaps of_d{maps.batch, maps.height, maps.width, maps.image_stride, growth, growth};
  const int64_t stride = of_d.input_point(count);
  for (int64_t t = 0; t < count; t++) {
    const int64_t tile = first + t, at = tile % per_image;
    const T* from = d + tile / per_image * of_d.image() + at / columns * 2 * of_d.row() + at % columns * 2 * growth;
    const auto read = [&](int y, int x, int64_t c)
        __attribute__((always_inline)) { return load(from + y * of_d.row() + x * growth + c); };
    transform_tile<T>(read, growth, count, stride, work.gradients + t * n16);
    for (int64_t o = 0; o < growth; o += kLanes<T>) {
      Vec<T> half[2][4];
#pragma GCC unroll 2
      for (int y = 0; y < 2; y++) spread(read(y + 1, 1, o), read(y + 1, 2, o), half[y]);
      T* to = work.spread + o / n16 * count * n16 + t * n16 + o % n16;
#pragma GCC unroll 4
      for (int x = 0; x < 4; x++) {
        Vec<T> found[4];
        spread(half[0][x], half[1][x], found);
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) store(to + (4 * y + x) * stride, found[y]);
      }
    }
  }

  int64_t tiles[kBackwardTiles], rows[n16];
  for (int64_t block = begin; block < end; block += kBackwardBlocks) {
    const int64_t blocks = end - block < kBackwardBlocks ? end - block : kBackwardBlocks, width = blocks * n16;
    const int64_t wide_stride = count * width + n16;
    transform_activated<T>(maps, layer.inner, layer.activation, layer.y, first, count, block * n16, block * n16 + width,
                           wide_stride, work.transformed);
    for (int64_t t = 0; t < count; t++) tiles[t] = t * width;
    for (int64_t i = 0; i < n16; i++) rows[i] = i * maps.wide;
    for (int64_t point = 0; point < kWinogradPoints; point++) {
      for (int64_t o = 0; o < layer.outputs; o += n16) {  // the filters' gradient: sums over tiles
        const Product<T> p{work.spread + point * stride + o * count, 1, 0, count,
                           work.transformed + point * wide_stride, count * n16,
                           work.filters + (point * growth + o) * maps.wide + block * n16, rows, nullptr, accumulate,
                           kNoFloor<T>};
        product<T, n16, 1>(p, layer.outputs - o < n16 ? layer.outputs - o : n16, 0, blocks);
      }
      const bool few = growth == n16;
      const Product<T> p{work.gradients + point * stride, few ? 1 : growth / n16, count * n16,
                         few ? layer.outputs : n16,
                         layer.filters + point * maps.wide * growth + block * growth * n16, growth * n16,
                         work.products + point * wide_stride, tiles, nullptr, false, kNoFloor<T>};
      product<T, 1, n16>(p, count, 0, blocks);
    }
    dispatch_activation(layer.activation.kind, [&]<ActivationKind A>() {
      finish_contract_backward<T, A>(maps, layer, first, count, block * n16, width, work.products, wide_stride,
                                     work.sums, g);
    });
  }
}

namespace {

// dy of some pixels in both orders, zeros behind the last one: dy[block][pixel][16], turned[pixel / 16][channel][16].
template <class T>
DNL_INLINE void load_dy(const BottleneckMaps& maps, const BottleneckBackward<T>& layer, int64_t first, int64_t count,
                        const ExpandBackward<T>& work) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t padded = (count + n16 - 1) / n16 * n16;
  for (int64_t o = 0; o < maps.wide; o += lanes) {
    const Vec<T> scale = load(layer.inner.scale + o), mean = load(layer.inner.mean + o), rate = load(layer.rate + o);
    const Vec<T> constant = load(layer.constant + o);
    T* plain = work.dy + o / n16 * kBackwardPanel * n16 + o % n16;
    Vec<T> sum{};
    for (int64_t p = 0; p < padded; p += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; i++) {
        square[i] = Vec<T>{};
        if (p + i < count) {
          const int64_t at = (first + p + i) * maps.wide + o;
          square[i] = load(layer.g + at) * scale + (rate * (load(layer.y + at) - mean) + constant);
          store(plain + (p + i) * n16, square[i]);
          sum += square[i];
        }
      }
      transpose<T>(square);
      T* to = work.turned + (p / n16 * maps.wide + o) * n16 + p % n16;
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; i++) store(to + i * n16, square[i]);
    }
    if (work.bias)
      for (int64_t i = 0; i < lanes; i++) work.bias[o + i] += sum[i];
  }
}

constexpr int kStreams = 16;

// The lines of a panel's pixels, in channels from `plane` on.
template <class T>
DNL_INLINE int64_t lines_of(const T* plane, int64_t area, const Run* runs, int run_count, Stream* ahead) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t n = 0;
  for (int r = 0; r < run_count; r++)
    for (int64_t k = 0; k < runs[r].count && n < kStreams; k += kLine)
      ahead[n++] = {reinterpret_cast<const char*>(plane + runs[r].from + k), area * int64_t(sizeof(T))};
  return n;
}

// total += scale * g, g = gradient * act'(scale * x + shift), of a channel's pixels, and its sums.
template <class T, ActivationKind A>
DNL_INLINE void add_through(const T* gradient, const T* x, const Run* runs, int run_count, T scale, T shift, T mean,
                            T leak, T* total, double* plain, double* moment) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> s = broadcast(scale), h = broadcast(shift), m = broadcast(mean);
  Vec<T> sum{}, product{};
  for (int r = 0; r < run_count; r++) {
    const T *from = x + runs[r].from, *back = gradient + runs[r].to;
    T* to = total + runs[r].from;
    int i = 0;
    Vec<T> value, slope;
    for (; i + lanes <= runs[r].count; i += lanes) {
      const Vec<T> state = load(from + i);
      activate<T, A>(state * s + h, leak, value, slope);
      const Vec<T> through = load(back + i) * slope;
      store(to + i, load(to + i) + s * through);
      sum += through;
      product += through * (state - m);
    }
    if (i < runs[r].count) {
      const int left = runs[r].count - i;
      const Vec<T> state = load_partial(from + i, left);
      activate<T, A>(state * s + h, leak, value, slope);
      const Vec<T> through = first_lanes<T>(load(back + i) * slope, left);
      store_masked<T>(to + i, load_partial(to + i, left) + s * through, left);
      sum += through;
      product += through * (state - m);
    }
  }
  *plain += sum_lanes<T>(sum);
  *moment += sum_lanes<T>(product);
}

}  // namespace

template <class T>
void bottleneck_expand_backward(const BottleneckMaps& maps, const BottleneckBackward<T>& layer, const T* states,
                                int64_t first, int64_t count, int64_t begin, int64_t end, bool accumulate,
                                const ExpandBackward<T>& work, T* total) {
  Run runs[kBackwardPanel];
  int run_count = 0;
  const int64_t area = maps.pixels();
  for (int64_t p = 0; p < count;) {
    const int64_t image = (first + p) / area, at = (first + p) % area, n = area - at < count - p ? area - at : count - p;
    runs[run_count++] = {image * maps.image_stride + at, int(p), int(n)};
    p += n;
  }
  load_dy<T>(maps, layer, first, count, work);

  const T leak = T(layer.activation.leak);
  const int64_t last = end * n16 < layer.channels ? end * n16 : layer.channels, pixel_blocks = (count + n16 - 1) / n16;
  int64_t rows[kBackwardDepth], lines[n16];
  for (int64_t i = 0; i < kBackwardDepth; i++) rows[i] = i * maps.wide;
  for (int64_t i = 0; i < n16; i++) lines[i] = i * kBackwardPanel;
  dispatch_activation(layer.activation.kind, [&]<ActivationKind A>() {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t c = begin * n16; c < last; c += kBackwardDepth) {
      const int64_t depth = last - c < kBackwardDepth ? last - c : kBackwardDepth;
      for (int64_t i = 0, n; i < depth; i += n) {
        for (n = 1; i + n < depth && layer.states[c + i + n] == layer.states[c + i] + n;) n++;
        load_panel<T, A, kBackwardPanel>(states + layer.states[c + i] * area, area, n, layer.scale + c + i,
                                         layer.shift + c + i, runs, run_count, leak, work.panel + i * kBackwardPanel);
      }
      Stream ahead[kStreams];
      const int64_t streams = c + depth < last ? lines_of<T>(states + layer.states[c + depth] * area, area, runs,
                                                             run_count, ahead) : 0;
      const Product<T> p{work.panel, 1, 0, count, work.dy, kBackwardPanel * n16, work.weight + c * maps.wide, rows,
                         nullptr, accumulate, kNoFloor<T>, ahead, streams};
      product<T, 1, kBackwardPanel>(p, depth, 0, maps.wide / n16);
      for (int64_t b = c; b < c + depth; b += n16) {
        const int64_t n = last - b < n16 ? last - b : n16;
        const Product<T> q{layer.weight + b * maps.wide, 1, 0, maps.wide, work.turned, maps.wide * n16, work.products,
                           lines, nullptr, false, kNoFloor<T>};
        for (int64_t i = 0; i < n; i++)  // needed after the product
          for (int r = 0; r < run_count; r++)
            for (int64_t k = 0; k < runs[r].count + kLine / 2; k += kLine)
              __builtin_prefetch(total + layer.states[b + i] * area + runs[r].from + k, 1, 3);
        product<T, n16, 1>(q, n, 0, pixel_blocks);
        for (int64_t i = 0; i < n; i++) {
          const int64_t plane = layer.states[b + i] * area;
          add_through<T, A>(work.products + i * kBackwardPanel, states + plane, runs, run_count, layer.scale[b + i],
                            layer.shift[b + i], layer.mean[b + i], leak, total + plane, work.sums + b + i,
                            work.sums + layer.channels + b + i);
        }
      }
    }
  });
}

template <class T>
void bottleneck_filter_gradient(const T* partial, int64_t chunks, int64_t chunk_stride, int64_t padded_out,
                                int64_t padded_in, int64_t outputs, int64_t channels, int64_t begin, int64_t end,
                                T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> half = broadcast(T(0.5));
  const auto transform = [&](const Vec<T>* u, int step, Vec<T>* g, int to_step) __attribute__((always_inline)) {
    const Vec<T> sum = (u[step] + u[2 * step]) * half;
    g[0] = u[0] + sum;
    g[to_step] = (u[step] - u[2 * step]) * half;
    g[2 * to_step] = sum + u[3 * step];
  };
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t c = begin; c < end; c += lanes) {
      Vec<T> u[4][4], rows[3][4], g[3][3];
#pragma GCC unroll 16
      for (int p = 0; p < kWinogradPoints; p++) {
        const T* from = partial + (p * padded_out + o) * padded_in + c;
        u[p / 4][p % 4] = load(from);
        for (int64_t k = 1; k < chunks; k++) u[p / 4][p % 4] += load(from + k * chunk_stride);
      }
#pragma GCC unroll 4
      for (int x = 0; x < 4; x++) transform(&u[0][x], 4, &rows[0][x], 4);
#pragma GCC unroll 3
      for (int y = 0; y < 3; y++) transform(rows[y], 1, g[y], 1);
      for (int64_t i = 0; i < lanes && c + i < channels; i++)
#pragma GCC unroll 9
        for (int t = 0; t < 9; t++) to[(o * channels + c + i) * 9 + t] = g[t / 3][t % 3][i];
    }
}

template <class T>
void bottleneck_weight_gradient(const T* partial, int64_t chunks, int64_t chunk_stride, int64_t padded_rows,
                                int64_t rows, int64_t columns, T factor, int64_t begin, int64_t end, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> f = broadcast(factor);
  for (int64_t c = begin; c < end; c += lanes)
    for (int64_t r = 0; r < rows; r += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; i++) {
        square[i] = Vec<T>{};
        if (c + i >= end) continue;
        const T* from = partial + (c + i) * padded_rows + r;
        square[i] = load(from);
        for (int64_t k = 1; k < chunks; k++) square[i] += load(from + k * chunk_stride);
        square[i] *= f;
      }
      transpose<T>(square);
      const int left = int(end - c < lanes ? end - c : lanes);
      for (int64_t i = 0; i < lanes && r + i < rows; i++) store_masked<T>(to + (r + i) * columns + c, square[i], left);
    }
}

#define DNL_INSTANTIATE(T)                                                                                            \
  template void pack_rows<T>(const T*, int64_t, int64_t, T, int64_t, int64_t, T*);                                    \
  template void pack_columns<T>(const T*, int64_t, T, int64_t, int64_t, int64_t, T*);                                 \
  template void pack_winograd<T>(const T*, int64_t, int64_t, bool, int64_t, int64_t, int64_t, int64_t, T*);           \
  template void bottleneck_gradient<T>(const BottleneckMaps&, const T*, const T*, int64_t, const T*, const T*,        \
                                       const T*, int64_t, int64_t, T*);                                               \
  template void bottleneck_contract_backward<T>(const BottleneckMaps&, const BottleneckBackward<T>&, const T*,        \
                                                int64_t, int64_t, int64_t, int64_t, bool, const ContractBackward<T>&, \
                                                T*);                                                                  \
  template void bottleneck_expand_backward<T>(const BottleneckMaps&, const BottleneckBackward<T>&, const T*, int64_t, \
                                              int64_t, int64_t, int64_t, bool, const ExpandBackward<T>&, T*);         \
  template void bottleneck_filter_gradient<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,         \
                                              int64_t, int64_t, T*);                                                  \
  template void bottleneck_weight_gradient<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T, int64_t,      \
                                              int64_t, T*);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
