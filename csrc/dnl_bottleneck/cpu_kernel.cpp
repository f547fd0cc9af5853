// Loops of params.h: evaluation, and what training shares with it.
#include "common/vec.h"
#include "dnl_bottleneck/params.h"
#include "dnl_bottleneck/tiles.h"

namespace dnl::DNL_ISA {
namespace {

static_assert(kBottleneckBlock == kOutputBlock && kBottleneckPanel == kPanelPixels && kBottleneckDepth == kPanelDepth);

constexpr int64_t kMostBlocks = 12, kStreams = kBottleneckPanel / 8 + 1 + 2 * kMostBlocks;

// What expand reads after part `part` of a panel: the next part's pixels and weights, or the next panel's pixels.
template <class T>
DNL_INLINE int64_t streams_ahead(const BottleneckMaps& maps, const BottleneckLayer<T>& layer, const T* states,
                                 int64_t part, int64_t parts, int64_t first, int64_t count, int64_t begin, int64_t end,
                                 Stream* ahead) {
  constexpr int64_t kLine = 64, kPerLine = kLine / sizeof(T);
  end = end - begin < kMostBlocks ? end : begin + kMostBlocks;
  const bool last = part + 1 == parts;
  const int64_t channel = last ? 0 : (part + 1) * layer.channels / parts, pixel = last ? first + count : first;
  int64_t n = 0;
  const T* pixels = states + pixel / maps.pixels() * maps.image_stride + pixel % maps.pixels() +
                    (layer.spans->first + channel) * maps.pixels();
  for (int64_t i = 0; i < count + kPerLine - 1; i += kPerLine)
    ahead[n++] = {reinterpret_cast<const char*>(pixels + i), maps.pixels() * int64_t(sizeof(T))};
  for (int64_t b = begin; b < end && !last; b++)
    for (int64_t i = 0; i < kOutputBlock; i += kPerLine)
      ahead[n++] = {reinterpret_cast<const char*>(layer.weight + (b * layer.channels + channel) * kOutputBlock + i),
                    kOutputBlock * int64_t(sizeof(T))};
  return n;
}

}  // namespace

template <class T>
void bottleneck_expand(const BottleneckMaps& maps, const BottleneckLayer<T>& layer, const T* states, int64_t first,
                       int64_t count, int64_t begin, int64_t end, T* panel, T* z) {
  Run runs[kBottleneckPanel];
  int64_t rows[kBottleneckPanel];  // where the pixels lie in z
  int run_count = 0;
  const int64_t area = maps.pixels(), width = maps.width;
  for (int64_t p = 0; p < count;) {
    const int64_t image = (first + p) / area, at = (first + p) % area;
    const int64_t n = area - at < count - p ? area - at : count - p;
    runs[run_count++] = {image * maps.image_stride + at, int(p), int(n)};
    for (int64_t i = 0; i < n && maps.raw; i++) rows[p + i] = (first + p + i) * maps.wide;
    for (int64_t y = at / width, x = at % width, i = 0; i < n && !maps.raw; i++) {
      rows[p + i] = image * maps.image() + (y + 1) * maps.row() + (x + 1) * maps.wide;
      if (++x == width) x = 0, y++;
    }
    p += n;
  }

  const T leak = T(layer.activation.leak);
  const bool relu = layer.activation.kind == ActivationKind::relu && !maps.raw;
  const int64_t parts = (layer.channels + kBottleneckDepth - 1) / kBottleneckDepth;
  const Span* span = layer.spans;
  int64_t used = 0;  // channels of the span
  for (int64_t part = 0; part < parts; part++) {
    const int64_t from = part * layer.channels / parts, depth = (part + 1) * layer.channels / parts - from;
    for (int64_t c = 0; c < depth;) {
      const int64_t n = span->count - used < depth - c ? span->count - used : depth - c;
      dispatch_activation(layer.activation.kind, [&]<ActivationKind A>() {
        load_panel<T, A>(states + (span->first + used) * area, area, n, layer.scale + from + c, layer.shift + from + c,
                         runs, run_count, leak, panel + c * kBottleneckPanel);
      });
      c += n;
      used += n;
      if (used == span->count) span++, used = 0;
    }
    Stream ahead[kStreams];
    const int64_t streams = streams_ahead(maps, layer, states, part, parts, first, count, begin, end, ahead);
    const T floor = relu && part + 1 == parts ? T(0) : T(-__builtin_inf());
    const Product<T> p{panel, 1,    0,          depth,    layer.weight + from * kOutputBlock, layer.channels * kOutputBlock,
                       z,     rows, layer.bias, part > 0, floor, ahead, streams};
    product<T, kBottleneckPanel, 1>(p, count, begin, end);
  }
  if (relu || maps.raw || layer.activation.kind == ActivationKind::identity) return;
  dispatch_activation(layer.activation.kind, [&]<ActivationKind A>() {
    for (int64_t p = 0; p < count; p++)
      for (int64_t o = begin * kOutputBlock; o < end * kOutputBlock; o += kLanes<T>) {
        Vec<T> value, slope;
        activate<T, A>(load(z + rows[p] + o), leak, value, slope);
        store(z + rows[p] + o, value);
      }
  });
}

namespace {

// Products of the transformed tiles with the filters, and the outputs from them into the slot of the states.
template <class T>
void finish_contract(const BottleneckMaps& maps, const BottleneckLayer<T>& layer, int64_t first, int64_t count,
                     const T* transformed, T* products, T* pixels, T* states, T* moments) {
  const int64_t columns = maps.tile_columns(), per_image = maps.tile_rows() * columns;
  const int64_t in_stride = maps.input_point(count), out_stride = maps.output_point(count);
  int64_t rows[kBottleneckTiles];
  for (int64_t t = 0; t < count; t++) rows[t] = t * maps.growth;
  const int64_t filter = maps.wide * maps.growth;
  for (int64_t point = 0; point < kWinogradPoints; point++) {
    const Product<T> p{transformed + point * in_stride, maps.wide / kOutputBlock, count * kOutputBlock, kOutputBlock,
                       layer.filters + point * filter,  maps.wide * kOutputBlock, products + point * out_stride,
                       rows,                            nullptr,                  false,
                       T(-__builtin_inf())};
    product<T, 1, kOutputBlock>(p, count, 0, maps.growth / kOutputBlock);
  }

  Segment<T> written[2 * kBottleneckTiles];
  int segments = 0;
  for (int64_t t = 0; t < count;) {  // tiles of one row of tiles at a time
    const int64_t image = (first + t) / per_image, at = (first + t) % per_image, y = at / columns * 2;
    const int64_t x = at % columns * 2, n = columns - at % columns < count - t ? columns - at % columns : count - t;
    const int64_t row = 2 * n * maps.growth;
    for (int64_t i = 0; i < n; i++)
      for (int64_t o = 0; o < maps.growth; o += kLanes<T>) {
        Vec<T> out[2][2];
        output_tile<T>(products + (t + i) * maps.growth + o, out_stride, out);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(pixels + j / 2 * row + (2 * i + j % 2) * maps.growth + o, out[j / 2][j % 2]);
      }
    T* to = states + image * maps.image_stride + layer.slot * maps.pixels() + y * maps.width + x;
    const int64_t width = maps.width - x < 2 * n ? maps.width - x : 2 * n;
    for (int64_t i = 0; i < 2 && y + i < maps.height; i++) {
      store_channels_first(pixels + i * row, maps.growth, width, layer.outputs, to + i * maps.width, maps.pixels());
      written[segments++] = {pixels + i * row, width};
    }
    pixels += 2 * row;
    t += n;
  }
  if (moments) column_moments<T>(written, segments, maps.growth, maps.growth, moments, maps.growth);
}

}  // namespace

template <class T>
void bottleneck_contract(const BottleneckMaps& maps, const BottleneckLayer<T>& layer, const T* z, int64_t first,
                         int64_t count, T* transformed, T* products, T* pixels, T* states) {
  const int64_t columns = maps.tile_columns(), per_image = maps.tile_rows() * columns;
  for (int64_t t = 0; t < count; t++) {
    const int64_t tile = first + t, at = tile % per_image;
    const T* from = z + tile / per_image * maps.image() + at / columns * 2 * maps.row() + at % columns * 2 * maps.wide;
    const auto read = [&](int y, int x, int64_t c)
        __attribute__((always_inline)) { return load(from + y * maps.row() + x * maps.wide + c); };
    transform_tile<T>(read, maps.wide, count, maps.input_point(count), transformed + t * kOutputBlock);
  }
  finish_contract<T>(maps, layer, first, count, transformed, products, pixels, states, nullptr);
}

template <class T>
void bottleneck_contract_raw(const BottleneckMaps& maps, const BottleneckLayer<T>& layer, const InnerNorm<T>& inner,
                             const T* y, int64_t first, int64_t count, T* transformed, T* products, T* pixels,
                             T* states, T* moments) {
  transform_activated<T>(maps, inner, layer.activation, y, first, count, 0, maps.wide, maps.input_point(count),
                         transformed);
  finish_contract<T>(maps, layer, first, count, transformed, products, pixels, states, moments);
}

template <class T>
void bottleneck_moments(const T* rows, int64_t row, int64_t count, int64_t channels, T* moments, int64_t stride) {
  const Segment<T> all{rows, count};
  column_moments<T>(&all, 1, row, channels, moments, stride);
}

#define DNL_INSTANTIATE(T)                                                                                           \
  template void bottleneck_expand<T>(const BottleneckMaps&, const BottleneckLayer<T>&, const T*, int64_t, int64_t,   \
                                     int64_t, int64_t, T*, T*);                                                      \
  template void bottleneck_contract<T>(const BottleneckMaps&, const BottleneckLayer<T>&, const T*, int64_t, int64_t, \
                                       T*, T*, T*, T*);                                                              \
  template void bottleneck_contract_raw<T>(const BottleneckMaps&, const BottleneckLayer<T>&, const InnerNorm<T>&,    \
                                           const T*, int64_t, int64_t, T*, T*, T*, T*, T*);                          \
  template void bottleneck_moments<T>(const T*, int64_t, int64_t, int64_t, T*, int64_t);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
