// dense_conv2d on a GPU, forward: an implicit matrix product, positions x output channels, whose left side is normalised
// and activated as it is loaded.
//
// A block of threads owns a tile and walks over the input channels in chunks of 16 (float32: 8). Every element passes
// through registers for the activation, so global memory is read by 128-bit loads rather than by cp.async.
#pragma once
#include "dense_conv2d/params.h"

namespace dnl {

// Where a channel of the tile lies in memory, for the tile's first image and row.
template <class T>
struct ConvPlane {
  const T* data;  // null: no such channel
  T* gradient;
  int64_t image_step, gradient_step;
  float scale, shift;
};

// Fills the table with input channels [first, first + kChunk).
template <class T>
DNL_DEVICE void find_planes(ConvPlane<T>* table, const ConvCommon& p, void* const* gradients, const ConvTile& tile,
                            int first) {
  if (threadIdx.x >= ConvElement<T>::kChunk) return;
  const int channel = first + threadIdx.x;
  ConvPlane<T> plane{};
  if (channel < p.channels) {
    int low = 0, high = p.count;  // the last state that begins at or before the channel
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (p.states[middle].first <= channel) low = middle;
      else high = middle;
    }
    const ConvState& s = p.states[low];
    const int inside = channel - s.first;
    const int64_t offset = static_cast<int64_t>(tile.row) * p.tiling.width;
    plane.image_step = s.image_step;
    plane.data = static_cast<const T*>(s.data) + tile.image * s.image_step + inside * s.channel_step + offset;
    if (gradients) {
      const int64_t step = static_cast<int64_t>(p.tiling.height) * p.tiling.width;
      plane.gradient_step = s.size * step;
      plane.gradient = static_cast<T*>(gradients[low]) + tile.image * plane.gradient_step + inside * step + offset;
    }
    plane.scale = p.norm_scale ? to_float(load_global(static_cast<const T*>(p.norm_scale) + channel)) : 1.0f;
    plane.shift = p.norm_shift ? to_float(load_global(static_cast<const T*>(p.norm_shift) + channel)) : 0.0f;
  }
  table[threadIdx.x] = plane;
}

// Loads the channels of the table into shared memory: `raw` as they are (unless null), `activated` after the prologue.
template <class T, bool kTf32 = false>
DNL_DEVICE void stage(T* activated, T* raw, const ConvPlane<T>* table, int groups, const ConvTiling& t,
                      const ConvTile& tile, Activation activation, bool prologue, bool vectors) {
  using E = ConvElement<T>;
  for_each_run<T>(t, tile, groups, t.radius, [&](int group, int image, int row, int column) {
    const int position = t.origin + image * t.image_pitch + row * t.pitch + column;
    const int count = t.width - column < E::kPixels ? t.width - column : E::kPixels;
    float v[E::kGroup][E::kPixels] = {};
#pragma unroll
    for (int k = 0; k < E::kGroup; k++) {
      const ConvPlane<T>& plane = table[group * E::kGroup + k];
      if (plane.data) load_pixels<T>(v[k], plane.data + image * plane.image_step + row * t.width + column, count, vectors);
    }
    if (raw) put_run<T>(raw, t.length, group, position, count, v);
    if (prologue) {
#pragma unroll
      for (int k = 0; k < E::kGroup; k++) {
        const ConvPlane<T>& plane = table[group * E::kGroup + k];
        const float scale = plane.scale, shift = plane.shift;
        if (plane.data) {
#pragma unroll
          for (int e = 0; e < E::kPixels; e++) v[k][e] = v[k][e] * scale + shift;
          for_all(activation, v[k], [](Activation which, float u) { return activate(which, u); });
        }
      }
    }
    if constexpr (kTf32) {
#pragma unroll
      for (int e = 0; e < E::kPixels; e++) v[0][e] = to_tf32(v[0][e]);
    }
    put_run<T>(activated, t.length, group, position, count, v);
  });
}

// ---- forward ----
template <class T, int kOctets, bool kTf32>
__global__ void __launch_bounds__(32 * kConvMaxWarps, kOctets > 1 ? 1 : 2)
    dense_conv2d_fwd_kernel(const __grid_constant__ ConvForward p) {
  using E = ConvElement<T>;
  using Filters = ConvFilters<T, kOctets, kTf32>;
  constexpr int kBlocks = kConvBlocksPerWarp;
  DNL_SHARED(ConvPlane<T>, table, E::kChunk);
  DNL_DYNAMIC_SHARED(T, planes);
  const ConvTiling& t = p.tiling;
  const ConvTile tile(t, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* filters = planes + E::kChunk * t.length;
  const int blocks = (t.span(tile.images, tile.rows) + 15) / 16;
  fill_zero(planes, E::kChunk * t.length * sizeof(T));
  float sum[kBlocks][4 * kOctets] = {};

  for (int first = 0; first < p.channels; first += E::kChunk) {
    find_planes<T>(table, p, nullptr, tile, first);
    __syncthreads();
    stage<T, kTf32>(planes, nullptr, table, E::kGroups, t, tile, p.activation, true, p.vectors);
    Filters::fill(filters, p.taps, [&](int output, int channel, int tap) {
      const int64_t at = (static_cast<int64_t>(output) * p.channels + first + channel) * p.taps + tap;
      return output < p.outputs && first + channel < p.channels ? load_global(static_cast<const T*>(p.weight) + at)
                                                                : from_float<T>(0.0f);
    });
    __syncthreads();
    conv_products<T, kOctets, kTf32>(sum, planes, filters, t, p.taps, blocks);
  }

  // Results pass through shared memory, eight outputs at a time, so that rows leave in wide stores.
  float* rows = reinterpret_cast<float*>(planes);  // [8][length]
  const int runs = (t.width + E::kPixels - 1) / E::kPixels, pixels = t.height * t.width;
#pragma unroll
  for (int o = 0; o < kOctets; o++) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kBlocks; m++) {
      const int block = m * warps + warp;
      if (block >= blocks) break;
      for_each_sum<T, kOctets, kTf32>(sum[m], block, [&](int output, int position, float value) {
        if (output / 8 == o) rows[output % 8 * t.length + position] = value;
      });
    }
    __syncthreads();
    for (int output = warp; output < 8 && 8 * o + output < p.outputs; output += warps) {
      const int channel = 8 * o + output;
      const float bias = p.bias ? to_float(load_global(static_cast<const T*>(p.bias) + channel)) : 0.0f;
      float total = 0, squares = 0;
      for (int i = lane; i < runs * tile.rows * tile.images; i += 32) {
        const int column = i % runs * E::kPixels, row = i / runs % tile.rows, image = i / runs / tile.rows;
        const int count = t.width - column < E::kPixels ? t.width - column : E::kPixels;
        const float* from = rows + output * t.length + image * t.image_pitch + row * t.pitch + column;
        float v[E::kPixels];
#pragma unroll
        for (int e = 0; e < E::kPixels; e++) {
          v[e] = e < count ? to_float(from_float<T>(p.scale * from[e] + bias)) : 0.0f;
          total += v[e];
          squares += v[e] * v[e];
        }
        T* y = static_cast<T*>(p.y) + ((tile.image + image) * p.outputs + channel) * pixels;
        store_pixels<T>(y + (tile.row + row) * t.width + column, v, count, p.store_vectors);
      }
      if (!p.moments) continue;
      total = warp_sum(total);
      squares = warp_sum(squares);
      if (lane < 2) {
        const int64_t at = (static_cast<int64_t>(blockIdx.x) * p.outputs + channel) * 2 + lane;
        store_global(p.moments + at, lane ? squares : total);
      }
    }
  }
}

}  // namespace dnl
