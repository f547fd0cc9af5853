// The tensors of a bottleneck block, what its layers read, and where their packed numbers lie. Included by cpu.cpp.
#pragma once
#include "common/conv_host.h"
#include "common/folded.h"
#include "common/phases.h"
#include "dnl_bottleneck/params.h"

namespace dnl {
namespace {

enum Name {  // the tensors of a layer, in the order of bottleneck.py
  kWeight, kBias, kGamma, kBeta, kMean, kVar, kInnerWeight, kInnerGamma, kInnerBeta, kInnerMean, kInnerVar, kNames
};

// What a layer reads, and where its numbers lie among the packed ones.
struct Layout {
  std::vector<Span> spans;
  int64_t channels = 0;
  int64_t scale, shift, weight, bias, filters;
};

// The layers of a block. The layout is the same on every instruction-set level.
struct Block {
  int64_t in_channels, growth, wide;  // as they are
  int64_t padded_growth, padded_wide;
  std::vector<Layout> layers;
  int64_t packed = 0;

  Block(int64_t in_channels, int64_t growth, int64_t bottleneck, const std::vector<int64_t>& connectivity)
      : in_channels(in_channels),
        growth(growth),
        wide(growth * bottleneck),
        padded_growth(round_up(growth, kBottleneckBlock)),
        padded_wide(round_up(wide, kBottleneckBlock)) {
    DNL_CHECK(in_channels > 0 && growth > 0 && bottleneck > 0, "dnl_bottleneck: channels");
    const auto place = [&](int64_t size) {
      const int64_t at = packed;
      packed += round_up(size, kBottleneckBlock);
      return at;
    };
    for (size_t at = 0; at < connectivity.size();) {
      const size_t states = layers.size() + 1;
      DNL_CHECK(at + states <= connectivity.size(), "dnl_bottleneck: connectivity is no triangle");
      Layout l;
      for (size_t j = 0; j < states; j++, at++) {
        if (!connectivity[at]) continue;
        const int64_t first = j ? channel_of(j - 1) : 0, count = j ? growth : in_channels;
        if (!l.spans.empty() && l.spans.back().first + l.spans.back().count == first)
          l.spans.back().count += count;
        else
          l.spans.push_back({first, count});
        l.channels += count;
      }
      DNL_CHECK(l.channels > 0, "dnl_bottleneck: a layer reads nothing");
      l.scale = place(l.channels);
      l.shift = place(l.channels);
      l.weight = place(padded_wide * l.channels);
      l.bias = place(padded_wide);
      l.filters = place(kWinogradPoints * padded_wide * padded_growth);
      layers.push_back(std::move(l));
    }
  }
  int64_t channel_of(int64_t layer) const { return in_channels + layer * growth; }
  int64_t channels() const { return channel_of(layers.size()); }
};

// Working memory of a thread for expand and contract.
template <class T>
struct ForwardScratch {
  Scratch scratch;
  T *panel, *transformed, *products, *pixels;

  explicit ForwardScratch(const BottleneckMaps& maps)
      : ForwardScratch(maps.panel(), maps.transformed(kBottleneckTiles), maps.products(kBottleneckTiles),
                       maps.outputs(kBottleneckTiles)) {}

 private:
  ForwardScratch(int64_t panel_size, int64_t transformed_size, int64_t products_size, int64_t pixels_size)
      : scratch(Scratch::bytes<T>(panel_size) + Scratch::bytes<T>(transformed_size) + Scratch::bytes<T>(products_size) +
                Scratch::bytes<T>(pixels_size)),
        panel(scratch.template take<T>(panel_size)),
        transformed(scratch.template take<T>(transformed_size)),
        products(scratch.template take<T>(products_size)),
        pixels(scratch.template take<T>(pixels_size)) {}
};

using Tensors = std::vector<std::optional<Tensor>>;

// The layers of a connectivity of so many numbers.
int64_t triangle_rows(int64_t numbers) {
  int64_t rows = 0;
  while (rows * (rows + 1) / 2 < numbers) rows++;
  return rows;
}

}  // namespace
}  // namespace dnl
