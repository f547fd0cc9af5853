// dnl_block on a GPU, resident: a block of threads runs all layers of a dense block on some samples, whose states stay in
// shared memory. x_0 and the filters are read once, the states are written once, whatever the depth.
//
// The planes of all channels lie side by side (common/conv.cuh). A layer walks over them in chunks: normalised and
// activated into one of two buffers in turn, so that one barrier for each chunk is enough; a layer in the paper's order
// that reads every state has no such prologue and multiplies the planes where they lie.
#pragma once
#include "common/conv.cuh"

namespace dnl {

constexpr int kBlockMaxLayers = 64;
constexpr int kBlockMaxOutputs = 32;

struct BlockForward {
  const void *x0, *weight;                       // weight: [layers][growth, channels read, k, k]
  const float *bias, *gamma, *beta, *mean, *var;  // may be null; gamma ..: of all channels read, layer by layer
                                                  // (preactivation), or of the outputs
  void* states;                                  // [batch, channels, height, width]
  int64_t image_step, channel_step;              // of x0, whose rows are dense
  uint64_t reads[kBlockMaxLayers];               // bit j: the layer reads state j
  int offsets[kBlockMaxLayers];                  // channels that all earlier layers read
  int widths[kBlockMaxLayers];                   // channels that the layer reads
  ConvTiling tiling;
  int in_channels, layers, growth, taps;
  Activation activation;
  float tau, eps;
  bool norm, preactivation, x0_vectors, vectors;  // vectors: accesses of 16 bytes

  DNL_EITHER int channels() const { return in_channels + layers * growth; }
};

// Shared memory in elements of T.
template <class T, int kOctets>
struct BlockLayout {
  int states, activated, filters, total;
  DNL_EITHER BlockLayout(const ConvTiling& t, int channels, int taps) {
    constexpr int kChunk = ConvElement<T>::kChunk;
    states = 0;
    activated = states + (channels + kChunk - 1) / kChunk * kChunk * t.length;
    filters = activated + 2 * kChunk * t.length;
    total = filters + 2 * ConvFilters<T, kOctets>::size(taps);
  }
};

// A channel as a layer reads it: its place among the channels read, or -1; the folded normalisation.
struct BlockChannel {
  int place;
  float scale, shift;
};

DNL_DEVICE void fold_norm(float& scale, float& shift, const BlockForward& p, int64_t i) {
  scale = 1;
  shift = 0;
  if (!p.norm) return;
  scale = (p.gamma ? load_global(p.gamma + i) : 1.0f) / sqrtf(load_global(p.var + i) + p.eps);
  shift = (p.beta ? load_global(p.beta + i) : 0.0f) - load_global(p.mean + i) * scale;
}

// Channels [first, first + kChunk) of the states for a layer.
template <class T>
DNL_DEVICE void find_channels(BlockChannel* table, const BlockForward& p, int layer, int first) {
  if (threadIdx.x >= ConvElement<T>::kChunk) return;
  const int channel = first + threadIdx.x, inside = channel - p.in_channels;
  const int state = inside < 0 ? 0 : 1 + inside / p.growth;
  const uint64_t reads = p.reads[layer];
  BlockChannel c{-1, 0, 0};
  if (state <= layer && (reads >> state & 1)) {
    c.place = channel;
    if (state) {
      const uint64_t before = reads & ((uint64_t(1) << state) - 1) & ~uint64_t(1);
      c.place = (reads & 1 ? p.in_channels : 0) + __popcll(before) * p.growth + inside % p.growth;
    }
    c.scale = 1;
    if (p.preactivation) fold_norm(c.scale, c.shift, p, p.offsets[layer] + c.place);
  }
  table[threadIdx.x] = c;
}

// The chunk's planes, normalised and activated; 0 for what the layer does not read.
template <class T>
DNL_DEVICE void activate_chunk(T* to, const T* from, const BlockChannel* table, const uint32_t* interior, int blocks,
                               const BlockForward& p) {
  using E = ConvElement<T>;
  const ConvTiling& t = p.tiling;
  constexpr int kTogether = E::kHalf ? 8 : 1;  // channels of a thread
  for (int i = threadIdx.x; i < E::kChunk / kTogether * 16 * blocks; i += blockDim.x) {
    const int group = i / (16 * blocks), position = i % (16 * blocks);
    if (!(interior[position / 16] >> (position % 16) & 1)) continue;
    const int64_t at = (group * t.length + t.origin + position) * kTogether;
    Pack<T, kTogether> x = *reinterpret_cast<const Pack<T, kTogether>*>(from + at);
    float v[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; k++) {
      const BlockChannel& c = table[group * kTogether + k];
      v[k] = c.scale * to_float(x.values[k]) + c.shift;
    }
    if (p.preactivation) for_all(p.activation, v, [](Activation which, float u) { return activate(which, u); });
#pragma unroll
    for (int k = 0; k < kTogether; k++)
      x.values[k] = from_float<T>(table[group * kTogether + k].place < 0 ? 0.0f : v[k]);
    *reinterpret_cast<Pack<T, kTogether>*>(to + at) = x;
  }
}

template <class T, int kOctets>
__global__ void __launch_bounds__(32 * kConvMaxWarps, 1) dnl_block_fwd_kernel(const __grid_constant__ BlockForward p) {
  using E = ConvElement<T>;
  using Filters = ConvFilters<T, kOctets>;
  DNL_SHARED(BlockChannel, tables, 2 * E::kChunk);
  DNL_SHARED(uint32_t, interior, kConvMaxPositions / 16);
  DNL_DYNAMIC_SHARED(T, states);
  const ConvTiling& t = p.tiling;
  const ConvTile tile(t, blockIdx.x);
  const BlockLayout<T, kOctets> at(t, p.channels(), p.taps);
  const int blocks = (t.span(tile.images, tile.rows) + 15) / 16;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t pixels = static_cast<int64_t>(t.height) * t.width;
  fill_zero(states, at.filters * sizeof(T));
  find_interior(interior, t, tile);
  __syncthreads();
  for (int first = 0; first < p.in_channels; first += E::kChunk)
    for_each_run<T>(t, tile, E::kGroups, 0, [&](int group, int image, int row, int column) {
      const int channel = first + group * E::kGroup;
      if (channel >= p.in_channels) return;
      const int count = t.width - column < E::kPixels ? t.width - column : E::kPixels;
      const T* x0 = static_cast<const T*>(p.x0) + (tile.image + image) * p.image_step + row * t.width + column;
      float v[E::kGroup][E::kPixels] = {};
#pragma unroll
      for (int k = 0; k < E::kGroup; k++)
        if (channel + k < p.in_channels) load_pixels<T>(v[k], x0 + (channel + k) * p.channel_step, count, p.x0_vectors);
      put_run<T>(states + first * t.length, t.length, group, t.origin + image * t.image_pitch + row * t.pitch + column,
                 count, v);
    });

  int buffer = 0;
  for (int layer = 0; layer < p.layers; layer++) {
    find_channels<T>(tables + buffer * E::kChunk, p, layer, 0);
    __syncthreads();  // the states that it reads are there
    const int read = p.in_channels + layer * p.growth, width = p.widths[layer];
    const bool in_place = !p.preactivation && width == read;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(p.offsets[layer]) * p.growth * p.taps;
    float sum[kConvBlocksPerWarp][4 * kOctets] = {};
    for (int first = 0; first < read; first += E::kChunk, buffer ^= 1) {
      const BlockChannel* table = tables + buffer * E::kChunk;
      T* activated = states + at.activated + buffer * E::kChunk * t.length;
      T* filters = states + at.filters + buffer * Filters::size(p.taps);
      const T* planes = states + first * t.length;
      if (!in_place) activate_chunk(activated, planes, table, interior, blocks, p);
      Filters::fill(filters, p.taps, [&](int output, int channel, int tap) {
        const int place = table[channel].place;
        if (place < 0 || output >= p.growth) return from_float<T>(0.0f);
        return load_global(weight + (static_cast<int64_t>(output) * width + place) * p.taps + tap);
      });
      if (first + E::kChunk < read)
        find_channels<T>(tables + (buffer ^ 1) * E::kChunk, p, layer, first + E::kChunk);
      __syncthreads();
      conv_products<T, kOctets>(sum, in_place ? planes : activated, filters, t, p.taps, blocks);
    }
    __syncthreads();  // nobody reads the octet in which the new channels begin
    const int slot = p.in_channels + layer * p.growth;
#pragma unroll
    for (int m = 0; m < kConvBlocksPerWarp; m++) {
      const int block = m * warps + warp;
      if (block >= blocks) break;
      for_each_sum<T, kOctets>(sum[m], block, [&](int output, int position, float value) {
        if (output >= p.growth || !(interior[position / 16] >> (position % 16) & 1)) return;
        value = p.tau * value + (p.bias ? load_global(p.bias + layer * p.growth + output) : 0.0f);
        if (!p.preactivation) {
          float scale, shift;
          fold_norm(scale, shift, p, layer * p.growth + output);
          value = activate(p.activation, scale * value + shift);
        }
        const int channel = slot + output;
        at_position(states, t.length, channel / E::kGroup, t.origin + position)[channel % E::kGroup] =
            from_float<T>(value);
      });
    }
  }

  __syncthreads();
  for (int first = 0; first < p.channels(); first += E::kChunk)
    for_each_run<T>(t, tile, E::kGroups, 0, [&](int group, int image, int row, int column) {
      const int channel = first + group * E::kGroup;
      const int count = t.width - column < E::kPixels ? t.width - column : E::kPixels;
      T* to = static_cast<T*>(p.states) + (tile.image + image) * p.channels() * pixels + row * t.width + column;
      float v[E::kGroup][E::kPixels] = {};
      get_run<T>(v, states + first * t.length, t.length, group,
                 t.origin + image * t.image_pitch + row * t.pitch + column, count);
#pragma unroll
      for (int k = 0; k < E::kGroup; k++)
        if (channel + k < p.channels()) store_pixels<T>(to + (channel + k) * pixels, v[k], count, p.vectors);
    });
}

}  // namespace dnl
