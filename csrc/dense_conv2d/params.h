// dense_conv2d on a GPU: what a launch is told.
#pragma once
#include "common/conv.cuh"

namespace dnl {

constexpr int kConvMaxStates = 96;   // their pointers travel in the launch's parameters
constexpr int kConvMaxOutputs = 32;
constexpr int kConvMaxWidth = 128;   // a row with its neighbours must fit in shared memory
constexpr int kConvSharedBytes = 98176;  // with the tables below the 99 KiB that every architecture since sm_80 has
constexpr int kConvPartialRows = 264;  // blocks of threads of the backward kernel: two for each multiprocessor of an H100

struct ConvState {  // channels [first, first + size); rows dense
  const void* data;
  int64_t image_step, channel_step;
  int first, size;
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
