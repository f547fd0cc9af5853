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
  bool raw = false;      // z is what the product makes, [pixel][channel]: neither normalised nor activated, no borders

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

// A training step keeps y = W act(scale * x + shift) + bias of every layer, [pixel][wide], before its normalisation.
// Forward, z = act(inner.scale * y + inner.shift) is made while tiles are transformed. Backward, layer by layer from the
// last one, over a buffer `total` of what every state's consumers have sent back so far:
// gradient: dout of the layer's outputs, from the slot of total, corrected for the statistics of the batch;
// contract, backward: V = B^T z B, D = B^T dout B, S = A dout A^T of tiles; the filters' gradient in Winograd's form is
// S^T V, and A^T (D U') A with the filters turned around is dz; g = dz act'(..) is written, [pixel][wide];
// expand, backward: dy = inner.scale * g + rate * (y - mean) + constant, W's gradient dy^T act(..), and W^T dy through
// the activation into total.
constexpr int64_t kBackwardTiles = 56;   // of contract at a time
constexpr int64_t kBackwardBlocks = 4;   // of 16 channels of z at a time: their tiles stay in the second cache
constexpr int64_t kBackwardPanel = 96;   // pixels of expand at a time
constexpr int64_t kBackwardDepth = 64;   // channels of states at a time

template <class T>
struct InnerNorm {
  const T *scale, *shift, *mean;  // [wide]
};

template <class T>
struct BottleneckBackward {
  const T *y, *g;          // [pixel][wide]; g is what contract writes
  InnerNorm<T> inner;
  const T *rate, *constant;  // [wide], of dy
  const T* filters;          // [kWinogradPoints][wide / 16][growth][16], of the transposed convolution
  int64_t outputs, slot;     // of the layer
  const int64_t* states;     // [channels]: the channels that it reads
  int64_t channels;
  const T *scale, *shift, *mean;  // [channels]
  const T* weight;                // [channels / 16][wide][16]
  Activation activation;
};

// Working memory of a task, and where its sums go.
template <class T>
struct ContractBackward {
  T *gradients, *spread, *transformed, *products;  // D, S, V and products, of kBackwardTiles tiles
  T* filters;    // [kWinogradPoints][growth][wide]
  double* sums;  // [2][wide]: of g and of g * (y - mean)
};
template <class T>
struct ExpandBackward {
  T *panel, *dy, *turned, *products;
  T* weight;             // [channels / 16 * 16][wide]
  double *sums, *bias;   // [2][channels]: of g and of g * (x - mean), g the gradient of act's argument; [wide] or nullptr
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
  /* the same from y, for training; moments: of the outputs, as bottleneck_moments writes them */                    \
  template <class T>                                                                                                \
  void bottleneck_contract_raw(const BottleneckMaps&, const BottleneckLayer<T>&, const InnerNorm<T>&, const T* y,    \
                               int64_t first, int64_t count, T* transformed, T* products, T* pixels, T* states,      \
                               T* moments);                                                                         \
  /* of every column of rows `row` apart: a number near its mean, and the sums of the differences from that number */ \
  /* and of their squares: three vectors `stride` apart */                                                          \
  template <class T>                                                                                                \
  void bottleneck_moments(const T* rows, int64_t row, int64_t count, int64_t channels, T* moments, int64_t stride);  \
  /* [rows / 16][columns][16] of a matrix [rows][columns] times `factor`, zeros behind the last row, for blocks */   \
  /* [begin, end) of rows; or [columns / 16][rows][16], zeros behind the last column, for rows [begin, end) */       \
  template <class T>                                                                                                \
  void pack_rows(const T* from, int64_t rows, int64_t columns, T factor, int64_t begin, int64_t end, T* to);         \
  template <class T>                                                                                                \
  void pack_columns(const T* from, int64_t columns, T factor, int64_t begin, int64_t end, int64_t rows, T* to);      \
  /* Winograd's form of filters [outputs, channels, 3, 3], [point][out / 16][in][16], for blocks [begin, end) of 16 */ \
  /* lanes: of outputs, or turned around for the transposed convolution, of channels */                             \
  template <class T>                                                                                                \
  void pack_winograd(const T* from, int64_t outputs, int64_t channels, bool turned, int64_t begin, int64_t end,      \
                     int64_t padded_out, int64_t padded_in, T* to);                                                 \
  /* d of pixels [first, first + count) of an image: total + rate * (x - mean) + constant (rate == nullptr: total) */ \
  template <class T>                                                                                                \
  void bottleneck_gradient(const BottleneckMaps&, const T* total, const T* states, int64_t outputs, const T* rate,   \
                           const T* mean, const T* constant, int64_t first, int64_t count, T* d);                   \
  /* tiles [first, first + count), blocks [begin, end) of z's channels; d as BottleneckMaps has z, with `growth` */  \
  template <class T>                                                                                                \
  void bottleneck_contract_backward(const BottleneckMaps&, const BottleneckBackward<T>&, const T* d, int64_t first,  \
                                    int64_t count, int64_t begin, int64_t end, bool accumulate,                     \
                                    const ContractBackward<T>&, T* g);                                              \
  /* pixels [first, first + count), blocks [begin, end) of the channels that the layer reads */                     \
  template <class T>                                                                                                \
  void bottleneck_expand_backward(const BottleneckMaps&, const BottleneckBackward<T>&, const T* states,              \
                                  int64_t first, int64_t count, int64_t begin, int64_t end, bool accumulate,        \
                                  const ExpandBackward<T>&, T* total);                                              \
  /* the gradient [outputs, channels, 3, 3] of filters from `chunks` partial sums [point][out][channels] each, for */ \
  /* channels [begin, end), whole blocks of 16 */                                                                   \
  template <class T>                                                                                                \
  void bottleneck_filter_gradient(const T* partial, int64_t chunks, int64_t chunk_stride, int64_t padded_out,        \
                                  int64_t padded_in, int64_t outputs, int64_t channels, int64_t begin, int64_t end,  \
                                  T* to);                                                                           \
  /* to[row][column] = factor * the sum of `chunks` matrices [column][padded_rows], for columns [begin, end) */      \
  template <class T>                                                                                                \
  void bottleneck_weight_gradient(const T* partial, int64_t chunks, int64_t chunk_stride, int64_t padded_rows,       \
                                  int64_t rows, int64_t columns, T factor, int64_t begin, int64_t end, T* to);      \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_BOTTLENECK)

}  // namespace dnl
