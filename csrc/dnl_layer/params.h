// dnl_layer on a GPU: what a launch is told, and how it divides its shared memory.
//
// Between the states and the result a quantity is a row of floats for each channel, with a column for each position.
// Half types are multiplied on tensor cores (tensor_cores.cuh): what is only ever an operand of a product is then kept
// as octets of channels, [octet][position][8], in the element type.
#pragma once
#include "common/activation.cuh"

namespace dnl {

constexpr int kLayerMaxStates = 128;  // a skip input is one more
constexpr int kLayerThreads = 256;
constexpr int kLayerWidth = 32;  // of a head's queries and values: they are registers of a thread or a warp
constexpr int kLayerChunk = 16;  // channels of the states that are accumulated at a time
constexpr int kLayerBackwardChunk = 8;  // float32: channels whose gradients are made at a time
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

enum class LayerKernel : int { softmax, gaussian, dot };

// The differentiable parameters, in the order of the operator's arguments.
enum LayerParameter : int {
  kAffineWeight, kAffineBias, kNormScale, kNormShift, kQueryWeight, kQueryBias, kKeyWeight, kKeyBias, kValueWeight,
  kValueBias, kOutputWeight, kOutputBias, kRho, kOutputScale, kOutputShift, kSkipWeight, kSkipBias, kLayerParameters
};

struct LayerState {
  const void* data;
  int64_t batch_step, channel_step, step;  // step: between positions
};

struct LayerSizes {
  int positions, columns, stride;  // columns: positions rounded up; stride: between rows of floats, an odd multiple of 4
  int width, result;               // channels of y and of the result
  int heads, query, value;         // widths of a head
  int query_padded, value_padded, width_padded, result_padded;  // widths rounded up, to 16 for tensor cores
  int count, channels, skip;  // states (the skip input is the last one), channels of the others, of the skip input
  LayerKernel kernel;
  Activation input_activation, activation;
  float tau;
  bool images, residual, tensor_cores;

  // Floats of memory that a matrix with a column of `padded` numbers for each position takes.
  DNL_EITHER int matrix(int padded) const { return tensor_cores ? padded * columns / 2 : padded * stride; }
};

struct LayerForward {
  LayerState states[kLayerMaxStates + 1];
  int first[kLayerMaxStates + 2];  // channel of each state, all side by side
  const void* parameters[kLayerParameters];
  void* out;
  LayerSizes sizes;
  bool wide_out;  // 16-byte accesses to the result
};

struct LayerBackward {
  LayerState states[kLayerMaxStates + 1];
  int first[kLayerMaxStates + 2];
  const void* parameters[kLayerParameters];
  int offsets[kLayerParameters];  // of each parameter's gradient in a row of `partial`, or -1
  void* dstates[kLayerMaxStates + 1];  // contiguous
  const void* dout;
  float* partial;  // [samples, size]
  int64_t size;
  LayerSizes sizes;
  bool wide_dout, need_states, need_parameters;
};

// Floats of shared memory in the forward pass. bias: tensor cores only, what is added to the scores of each key.
struct LayerLayout {
  int y, z, k, v, bias, weights, total;

  DNL_EITHER explicit LayerLayout(const LayerSizes& s) {
    y = 0;
    z = y + s.width * s.stride;
    k = z + s.result * s.stride;
    v = k + s.matrix(s.query_padded);
    bias = v + s.matrix(s.value_padded);
    weights = bias + (s.tensor_cores ? s.stride : 0);
    total = weights + weights_of(s);
  }
  // Of two chunks' filters, or a head's projections with their biases.
  DNL_EITHER static int weights_of(const LayerSizes& s) {
    const int chunks = 2 * s.width_padded * kLayerChunk, biases = 2 * s.query_padded + s.value_padded;
    const int head = s.width_padded * biases + s.result_padded * s.value_padded;
    const int elements = chunks > head ? chunks : head;
    return (s.tensor_cores ? elements / 2 : elements) + biases;
  }
};

// Floats of shared memory in the backward pass. Rows from q on are used anew for each head, and before and after them.
struct LayerBackwardLayout {
  int y, dz, dy, q, k, v, dout, t, bias, shift, delta, drho, weights, total;

  DNL_EITHER LayerBackwardLayout(const LayerSizes& s, bool norm, bool output_norm) {
    y = 0;
    dz = y + s.width * s.stride;
    dy = dz + s.result * s.stride;
    q = dy + s.width * s.stride;
    k = s.kernel == LayerKernel::gaussian ? q : q + s.matrix(s.query_padded);  // the same projection
    v = k + s.matrix(s.query_padded);
    dout = v + s.matrix(s.value_padded);
    t = dout + s.matrix(s.value_padded);
    bias = t + s.matrix(s.query_padded > s.value_padded ? s.query_padded : s.value_padded);
    shift = bias + (s.tensor_cores ? s.stride : 0);
    delta = shift + s.stride;
    drho = delta + s.stride;
    weights = drho + s.stride;
    // A chunk of the states: activations and rows of products for norms; tensor cores: also the states themselves,
    // and sums of each warp.
    const int chunk = s.tensor_cores ? 2 * s.matrix(kLayerChunk) + kLayerThreads / 32 * kLayerChunk * 2
                                     : (norm ? 3 : 1) * kLayerBackwardChunk * s.stride;
    const int output = output_norm ? 2 * s.result * s.stride : 0, most = q + (chunk > output ? chunk : output);
    if (weights < most) weights = most;
    total = weights + LayerLayout::weights_of(s);
  }
};

}  // namespace dnl
