// An evaluated bottleneck block (DenseNet-BC), layer by layer in two steps over a buffer of states [B, C, H, W]:
// expand: z = act(W act(scale * x + shift) + bias), pixels by b * G channels, the second normalisation folded into W;
// contract: the 3x3 convolution of z into the layer's slot of the states, in Winograd's form F(2x2, 3x3).
//
// z has its channels in the vector lanes: [image][row][column][channel], with zeros around every image, and more of them
// where tiles of 2 x 2 pixels pass its edge. Then Winograd's transforms are sums of vectors without any shuffling, and
// both steps are the same product (common/product.h). The states stay channels first: expand reads each number of them
// once for all outputs and broadcasts it, and contract turns only its G channels around.
#pragma once
#include <cstdint>

#include "common/conv.h"

namespace dnl {

constexpr int64_t kBottleneckBlock = 16;   // channels, to which those of z and of the outputs are filled up
constexpr int64_t kBottleneckPanel = 48;   // pixels of a task of expand at most
constexpr int64_t kBottleneckDepth = 96;   // channels of a panel at a time: with 64 outputs' weights in the first cache
constexpr int64_t kBottleneckTiles = 28;   // tiles of a task of contract at most
constexpr int64_t kWinogradPoints = 16;    // products of a tile: 4 x 4

// Images [0, batch) that are computed together. All counts in elements.
struct BottleneckMaps {
  int64_t batch, height, width;
  int64_t image_stride;  // of the states
  int64_t wide, growth;  // channels of z and of an output, filled up

  int64_t pixels() const { return height * width; }
  int64_t tile_rows() const { return (height + 1) / 2; }
  int64_t tile_columns() const { return (width + 1) / 2; }
  int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
  int64_t row() const { return (2 * tile_columns() + 2) * wide; }  // of z
  int64_t image() const { return (2 * tile_rows() + 2) * row(); }
  // Of expand's and contract's working memory.
  int64_t panel() const { return (kBottleneckDepth + 1) * kBottleneckPanel; }
  int64_t input_point(int64_t tiles) const { return tiles * wide + kBottleneckBlock; }
  int64_t output_point(int64_t tiles) const { return tiles * growth + kBottleneckBlock; }
  int64_t transformed(int64_t tiles) const { return kWinogradPoints * input_point(tiles); }
  int64_t products(int64_t tiles) const { return kWinogradPoints * output_point(tiles); }
  int64_t outputs(int64_t tiles) const { return (4 * tiles + 2 * kBottleneckBlock) * growth; }
};

struct Span {  // channels of the states
  int64_t first, count;
};

template <class T>
struct BottleneckLayer {
  const Span* spans;  // that it reads
  int64_t channels;   // of all spans
  const T *scale, *shift;  // [channels]
  const T* weight;         // [wide / 16][channels][16]
  const T* bias;           // [wide]
  const T* filters;        // [kWinogradPoints][growth / 16][wide][16]
  int64_t outputs;         // growth rate
  int64_t slot;            // the first channel of the output
  Activation activation;
};

#define DNL_DECLARE_BOTTLENECK(LEVEL)                                                                               \
  namespace LEVEL {                                                                                                 \
  /* z of pixels [first, first + count), count <= kBottleneckPanel, for blocks [begin, end) of its channels */       \
  template <class T>                                                                                                \
  void bottleneck_expand(const BottleneckMaps&, const BottleneckLayer<T>&, const T* states, int64_t first,           \
                         int64_t count, int64_t begin, int64_t end, T* panel, T* z);                                \
  /* outputs of tiles [first, first + count), count <= kBottleneckTiles */                                          \
  template <class T>                                                                                                \
  void bottleneck_contract(const BottleneckMaps&, const BottleneckLayer<T>&, const T* z, int64_t first,              \
                           int64_t count, T* transformed, T* products, T* pixels, T* states);                       \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_BOTTLENECK)

}  // namespace dnl
