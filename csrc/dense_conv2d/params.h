// dense_conv2d on a GPU: what a launch is told, and how a batch is cut into tiles.
//
// A tile is some whole images, or some rows of one image, with zero padding in flat positions: rows are `pitch` = width +
// radius apart, so that the padding to the right of a row is also the padding to the left of the next one, and images
// are `radius` zero rows apart. A tap of the filter is then a fixed offset, whatever the width, and a block of 16
// consecutive positions is the m of a matrix product (common/conv.h does the same on the CPU).
#pragma once
#include <cstdint>

#include "common/conv.h"

#ifdef __CUDACC__
#define DNL_EITHER __host__ __device__
#else
#define DNL_EITHER
#endif

namespace dnl {

constexpr int kConvMaxStates = 96;   // their pointers travel in the launch's parameters
constexpr int kConvMaxOutputs = 32;
constexpr int kConvMaxWidth = 128;   // a row with its neighbours must fit in shared memory
constexpr int kConvMaxWarps = 16;
constexpr int kConvBlocksPerWarp = 5;   // blocks of 16 positions that a warp accumulates in registers
constexpr int kConvMaxPositions = 16 * kConvBlocksPerWarp * kConvMaxWarps;
constexpr int kConvSharedBytes = 94 << 10;  // with the tables below the 99 KiB that every architecture since sm_80 has
constexpr int kConvPartialRows = 264;  // blocks of threads of the backward kernel: two for each multiprocessor of an H100

struct ConvState {  // channels [first, first + size); rows dense
  const void* data;
  int64_t image_step, channel_step;
  int first, size;
};

struct ConvTiling {
  int height, width, radius;
  int images, rows;  // of a tile
  int bands;         // tiles that cover the height; more than 1 only where images == 1
  int pitch, image_pitch;
  int origin;  // the first pixel's place in a plane of `length` positions
  int length;  // 4 modulo 32: neighbouring channels lie in other banks
  int64_t batch;

  DNL_EITHER int span(int of_images, int of_rows) const {  // positions from the first pixel to behind the last one
    return (of_images - 1) * image_pitch + (of_rows - 1) * pitch + width;
  }
  DNL_EITHER int64_t tiles() const { return (batch + images - 1) / images * bands; }
  DNL_EITHER int blocks() const { return (span(images, rows) + 15) / 16; }
};

struct ConvCommon {
  ConvState states[kConvMaxStates];
  const void *weight, *norm_scale, *norm_shift;  // norm_*: may be null
  ConvTiling tiling;
  int count, channels, outputs, taps;
  Activation activation;
  float scale;
  bool vectors;  // states in accesses of 16 bytes
};

struct ConvForward : ConvCommon {
  const void* bias;  // may be null
  void* y;
  float* moments;  // [tiles, outputs, 2]: sums of y and y^2; may be null
  bool store_vectors;
};

// A row of partial sums for each block of the launch: the weight gradient, sums of g and g x for each channel, of dy for
// each output.
struct ConvPartial {
  float* data;
  int64_t row;  // floats
  int64_t weights, moments;  // how many of the first two kinds
};

struct ConvBackward : ConvCommon {
  void* dstates[kConvMaxStates];  // [batch, size, height, width] each
  const void* dy;                 // contiguous
  ConvPartial partial;
  bool dy_vectors, need_states, need_weight, need_norm;
};

struct ConvReduce {
  ConvPartial partial;
  int64_t rows;
  void *weight, *bias, *norm_scale, *norm_shift;  // null where unwanted
  int outputs;
  float scale;  // of the weight gradient
};

static_assert(sizeof(ConvForward) <= 4096 && sizeof(ConvBackward) <= 4096, "parameters of a launch");

}  // namespace dnl
