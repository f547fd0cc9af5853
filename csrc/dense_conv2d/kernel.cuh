// dense_conv2d on a GPU, forward: an implicit matrix product, positions x output channels, whose left side is normalised
// and activated as it is loaded.
//
// A block of threads owns a tile and walks over the input channels in chunks of 16 (float32: 8). Half types are kept as
// octets of channels, [octet][position][8], so that ldmatrix takes any 8 consecutive positions of any tap without a bank
// conflict and mma.sync multiplies; float32 is kept as [channel][position] and multiplied by FFMA. Every element passes
// through registers for the activation, so global memory is read by 128-bit loads rather than by cp.async.
#pragma once
#include "common/activation.cuh"
#include "dense_conv2d/params.h"

namespace dnl {

template <class T>
struct ConvElement {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kChunk = kHalf ? 16 : 8;    // channels
  static constexpr int kGroup = kHalf ? 2 : 1;     // channels that a thread loads together: a 32-bit word
  static constexpr int kPixels = 16 / sizeof(T);   // that a thread loads at once
  static constexpr int kGroups = kChunk / kGroup;
};

// Where a channel of the tile lies in memory, for the tile's first image and row.
template <class T>
struct ConvPlane {
  const T* data;  // null: no such channel
  T* gradient;
  int64_t image_step, gradient_step;
  float scale, shift;
};

// The tile of a block of threads.
struct ConvTile {
  int64_t image;
  int row, images, rows;

  DNL_DEVICE ConvTile(const ConvTiling& t, int64_t number) {
    row = static_cast<int>(number % t.bands) * t.rows;
    image = number / t.bands * t.images;
    images = static_cast<int>(t.batch - image < t.images ? t.batch - image : t.images);
    rows = t.height - row < t.rows ? t.height - row : t.rows;
  }
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

// Calls body(group, image, row, column) for every run of kPixels pixels of the tile, the rows around it included where
// the image has them. Lanes take 8 groups of channels by consecutive rows: stores to shared memory meet no conflict.
template <class T, class Body>
DNL_DEVICE void for_each_run(const ConvTiling& t, const ConvTile& tile, int groups, int radius, Body body) {
  const int before = tile.row < radius ? tile.row : radius, below = t.height - tile.row - tile.rows;
  const int rows = before + tile.rows + (below < radius ? below : radius);
  const int runs = (t.width + ConvElement<T>::kPixels - 1) / ConvElement<T>::kPixels;
  for (int i = threadIdx.x; i < groups * rows * tile.images * runs; i += blockDim.x) {
    const int group = i % groups, r = i / groups, row = r % rows - before;
    body(group, r / rows % tile.images, row, r / rows / tile.images * ConvElement<T>::kPixels);
  }
}

template <class T>
DNL_DEVICE void load_pixels(float (&v)[ConvElement<T>::kPixels], const T* p, int count, bool vectors) {
  constexpr int kPixels = ConvElement<T>::kPixels;
  if (vectors) {
    const Pack<T, kPixels> pack = load_pack<T, kPixels>(p);
#pragma unroll
    for (int e = 0; e < kPixels; e++) v[e] = to_float(pack.values[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kPixels; e++) v[e] = e < count ? to_float(load_global(p + e)) : 0.0f;
  }
}

template <class T>
DNL_DEVICE void store_pixels(T* p, const float (&v)[ConvElement<T>::kPixels], int count, bool vectors) {
  constexpr int kPixels = ConvElement<T>::kPixels;
  if (vectors) {
    Pack<T, kPixels> pack;
#pragma unroll
    for (int e = 0; e < kPixels; e++) pack.values[e] = from_float<T>(v[e]);
    store_pack(p, pack);
  } else {
#pragma unroll
    for (int e = 0; e < kPixels; e++)
      if (e < count) store_global(p + e, from_float<T>(v[e]));
  }
}

// Several values at once: one branch for all of them. apply(activation as a constant, value).
template <int N, class Apply>
DNL_DEVICE void for_all(Activation activation, float (&v)[N], Apply apply) {
  const auto each = [&](auto which) {
#pragma unroll
    for (int e = 0; e < N; e++) v[e] = apply(decltype(which)::value, v[e]);
  };
  switch (activation) {
    case Activation::relu: return each(std::integral_constant<Activation, Activation::relu>{});
    case Activation::leaky_relu: return each(std::integral_constant<Activation, Activation::leaky_relu>{});
    case Activation::tanh: return each(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::gelu: return each(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::silu: return each(std::integral_constant<Activation, Activation::silu>{});
    default: return each(std::integral_constant<Activation, Activation::identity>{});
  }
}

// The place of a group's channels at a position.
template <class T>
DNL_DEVICE T* at_position(T* planes, int length, int group, int position) {
  if constexpr (ConvElement<T>::kHalf) return planes + (group / 4 * length + position) * 8 + group % 4 * 2;
  else return planes + group * length + position;
}

// A run of pixels between registers and shared memory.
template <class T>
DNL_DEVICE void put_run(T* planes, int length, int group, int position, int count,
                        const float (&v)[ConvElement<T>::kGroup][ConvElement<T>::kPixels]) {
#pragma unroll
  for (int e = 0; e < ConvElement<T>::kPixels; e++) {
    if (e >= count) break;
    T* to = at_position(planes, length, group, position + e);
    if constexpr (ConvElement<T>::kHalf) *reinterpret_cast<uint32_t*>(to) = pack<T>(v[0][e], v[1][e]);
    else *to = v[0][e];
  }
}
template <class T>
DNL_DEVICE void get_run(float (&v)[ConvElement<T>::kGroup][ConvElement<T>::kPixels], const T* planes, int length,
                        int group, int position, int count) {
#pragma unroll
  for (int e = 0; e < ConvElement<T>::kPixels; e++) {
    if (e >= count) break;
    const T* from = at_position(const_cast<T*>(planes), length, group, position + e);
    if constexpr (ConvElement<T>::kHalf) {
      const float2 pair = unpack<T>(*reinterpret_cast<const uint32_t*>(from));
      v[0][e] = pair.x;
      v[1][e] = pair.y;
    } else {
      v[0][e] = *from;
    }
  }
}

// Loads the channels of the table into shared memory: `raw` as they are (unless null), `activated` after the prologue.
template <class T>
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
    put_run<T>(activated, t.length, group, position, count, v);
  });
}

DNL_DEVICE void fill_zero(void* shared, int bytes) {
  uint4* words = static_cast<uint4*>(shared);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) words[i] = make_uint4(0, 0, 0, 0);
}

// The offset of a tap: 0 for 1x1, row by row for 3x3.
DNL_DEVICE int tap_offset(const ConvTiling& t, int tap) {
  const int side = 2 * t.radius + 1;
  return (tap / side - t.radius) * t.pitch + tap % side - t.radius;
}

// ---- forward ----
// Filters of a chunk in shared memory. Half types: [output][tap][16], rows an odd number of 16 bytes apart; float32:
// [channel][tap][output].
template <class T, int kOctets>
struct ConvFilters {
  static constexpr int kOutputs = 8 * kOctets;
  DNL_DEVICE static int row(int taps) { return taps * 16 + 8; }
  DNL_DEVICE static int place(int output, int channel, int tap, int taps) {
    if constexpr (ConvElement<T>::kHalf) return output * row(taps) + tap * 16 + channel;
    else return (channel * taps + tap) * kOutputs + output;
  }
  DNL_DEVICE static void load(T* to, const ConvCommon& p, int first) {
    const int inner = ConvElement<T>::kChunk * p.taps;
    for (int i = threadIdx.x; i < kOutputs * inner; i += blockDim.x) {
      const int output = i / inner, channel = i % inner / p.taps, tap = i % p.taps;
      T value = from_float<T>(0.0f);
      if (output < p.outputs && first + channel < p.channels)
        value = load_global(static_cast<const T*>(p.weight) +
                            (static_cast<int64_t>(output) * p.channels + first) * p.taps + i % inner);
      to[place(output, channel, tap, p.taps)] = value;
    }
  }
};

template <class T, int kOctets>
__global__ void __launch_bounds__(32 * kConvMaxWarps, kOctets > 1 ? 1 : 2)
    dense_conv2d_fwd_kernel(const __grid_constant__ ConvForward p) {
  using E = ConvElement<T>;
  using Filters = ConvFilters<T, kOctets>;
  constexpr int kBlocks = kConvBlocksPerWarp;
  DNL_SHARED(ConvPlane<T>, table, E::kChunk);
  DNL_DYNAMIC_SHARED(T, planes);
  const ConvTiling& t = p.tiling;
  const ConvTile tile(t, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* filters = planes + E::kChunk * t.length;
  const int blocks = (t.span(tile.images, tile.rows) + 15) / 16;
  fill_zero(planes, E::kChunk * t.length * sizeof(T));
  // Half types: the fragments of mma.sync. float32: positions lane and lane + 16 of a pair of blocks, every output.
  float sum[kBlocks][4 * kOctets] = {};

  for (int first = 0; first < p.channels; first += E::kChunk) {
    find_planes<T>(table, p, nullptr, tile, first);
    __syncthreads();
    stage<T>(planes, nullptr, table, E::kGroups, t, tile, p.activation, true, p.vectors);
    Filters::load(filters, p, first);
    __syncthreads();
    if constexpr (E::kHalf) {
      const T* from = planes + (lane / 16 * t.length + t.origin + lane % 16) * 8;
      const T* filter = filters + lane % 8 * Filters::row(p.taps) + lane / 8 % 2 * 8;
#pragma unroll 1
      for (int tap = 0; tap < p.taps; tap++) {
        const T* shifted = from + tap_offset(t, tap) * 8;
        uint32_t b[kOctets][2];
#pragma unroll
        for (int o = 0; o < kOctets; o++) ldmatrix(b[o], filter + o * 8 * Filters::row(p.taps) + tap * 16);
#pragma unroll
        for (int m = 0; m < kBlocks; m++) {
          const int block = m * warps + warp;
          if (block >= blocks) break;
          uint32_t a[4];
          ldmatrix(a, shifted + block * 16 * 8);
#pragma unroll
          for (int o = 0; o < kOctets; o++)
            mma_m16n8k16<T>(*reinterpret_cast<float(*)[4]>(&sum[m][4 * o]), a, b[o][0], b[o][1]);
        }
      }
    } else {
      // Two lanes share a position: each takes one half of the outputs.
      const int half = lane / 16 * 4 * kOctets;
#pragma unroll 1
      for (int k = 0; k < E::kChunk * p.taps; k++) {
        const T* from = planes + k / p.taps * t.length + t.origin + lane % 16 + tap_offset(t, k % p.taps);
        float w[4 * kOctets];
#pragma unroll
        for (int o = 0; o < 4 * kOctets; o++) w[o] = filters[k * Filters::kOutputs + half + o];
#pragma unroll
        for (int m = 0; m < kBlocks; m++) {
          const int block = m * warps + warp;
          if (block >= blocks) break;
          const float x = from[block * 16];
#pragma unroll
          for (int o = 0; o < 4 * kOctets; o++) sum[m][o] += w[o] * x;
        }
      }
    }
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
      if constexpr (E::kHalf) {
#pragma unroll
        for (int e = 0; e < 4; e++)
          rows[(lane % 4 * 2 + e % 2) * t.length + block * 16 + lane / 4 + e / 2 * 8] = sum[m][4 * o + e];
      } else {
#pragma unroll
        for (int e = 0; e < 4 * kOctets; e++) {
          const int output = lane / 16 * 4 * kOctets + e - 8 * o;
          if (output >= 0 && output < 8) rows[output * t.length + block * 16 + lane % 16] = sum[m][e];
        }
      }
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
