// Convolutions on a GPU: what dense_conv2d and dnl_block share.
//
// A tile is some whole images, or some rows of one image, with zero padding in flat positions: rows are `pitch` = width +
// radius apart, so that the padding to the right of a row is also the padding to the left of the next one, and images
// are `radius` zero rows apart. A tap of the filter is then a fixed offset, whatever the width, and a block of 16
// consecutive positions is the m of a matrix product (common/conv.h does the same on the CPU).
//
// Half types are kept as octets of channels, [octet][position][8], so that ldmatrix takes any 8 consecutive positions of
// any tap without a bank conflict and mma.sync multiplies; float32 is kept as [channel][position] and multiplied by FFMA,
// or, with kTf32, as tf32 by mma.sync: what is an operand there is rounded when it is put into shared memory.
#pragma once
#include "common/activation.cuh"

namespace dnl {

constexpr int kConvMaxWarps = 16;
constexpr int kConvBlocksPerWarp = 5;  // blocks of 16 positions that a warp accumulates in registers
constexpr int kConvMaxPositions = 16 * kConvBlocksPerWarp * kConvMaxWarps;

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

  static ConvTiling of(int64_t batch, int64_t height, int64_t width, int radius, int64_t images, int64_t rows) {
    ConvTiling t{};
    t.batch = batch;
    t.height = static_cast<int>(height);
    t.width = static_cast<int>(width);
    t.radius = radius;
    t.images = static_cast<int>(images);
    t.rows = static_cast<int>(rows);
    t.bands = static_cast<int>((height + rows - 1) / rows);
    t.pitch = static_cast<int>(width) + radius;
    t.image_pitch = static_cast<int>(rows + radius) * t.pitch;
    t.origin = radius * t.pitch + radius;
    const int used = t.origin + 16 * t.blocks() + radius * (t.pitch + 1);
    t.length = (used + 27) / 32 * 32 + 4;
    return t;
  }
};

template <class T>
struct ConvElement {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kChunk = kHalf ? 16 : 8;    // channels
  static constexpr int kGroup = kHalf ? 2 : 1;     // channels that a thread loads together: a 32-bit word
  static constexpr int kPixels = 16 / sizeof(T);   // that a thread loads at once
  static constexpr int kGroups = kChunk / kGroup;
};

template <bool kTf32, class T>
DNL_DEVICE T as_operand(T v) {
  if constexpr (kTf32) return to_tf32(v);
  else return v;
}

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

// Several values at once: one branch for all of them. apply(activation of a constant kind, value).
template <int N, class Apply>
DNL_DEVICE void for_all(Activation activation, float (&v)[N], Apply apply) {
  const auto each = [&](auto which) {
#pragma unroll
    for (int e = 0; e < N; e++) v[e] = apply(Activation{decltype(which)::value, activation.leak}, v[e]);
  };
  switch (activation.kind) {
    case ActivationKind::relu: return each(std::integral_constant<ActivationKind, ActivationKind::relu>{});
    case ActivationKind::leaky_relu: return each(std::integral_constant<ActivationKind, ActivationKind::leaky_relu>{});
    case ActivationKind::tanh: return each(std::integral_constant<ActivationKind, ActivationKind::tanh>{});
    case ActivationKind::gelu: return each(std::integral_constant<ActivationKind, ActivationKind::gelu>{});
    case ActivationKind::silu: return each(std::integral_constant<ActivationKind, ActivationKind::silu>{});
    default: return each(std::integral_constant<ActivationKind, ActivationKind::identity>{});
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

DNL_DEVICE void fill_zero(void* shared, int bytes) {
  uint4* words = static_cast<uint4*>(shared);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) words[i] = make_uint4(0, 0, 0, 0);
}

// The offset of a tap: 0 for 1x1, row by row for 3x3.
DNL_DEVICE int tap_offset(const ConvTiling& t, int tap) {
  const int side = 2 * t.radius + 1;
  return (tap / side - t.radius) * t.pitch + tap % side - t.radius;
}

// Filters of a chunk in shared memory. Half types: [output][tap][16], rows an odd number of 16 bytes apart; float32:
// [channel][tap][output]; tf32: [tap][output][8].
template <class T, int kOctets, bool kTf32 = false>
struct ConvFilters {
  static constexpr int kOutputs = 8 * kOctets;
  DNL_EITHER static int row(int taps) { return taps * 16 + 8; }
  DNL_EITHER static int size(int taps) {
    return ConvElement<T>::kHalf ? kOutputs * row(taps) : kOutputs * taps * ConvElement<T>::kChunk;
  }
  // value(output, channel of the chunk, tap) for all of them.
  template <class Value>
  DNL_DEVICE static void fill(T* to, int taps, Value value) {
    const int inner = ConvElement<T>::kChunk * taps;
    for (int i = threadIdx.x; i < kOutputs * inner; i += blockDim.x) {
      const int output = i / inner, channel = i % inner / taps, tap = i % taps;
      const int place = ConvElement<T>::kHalf ? output * row(taps) + tap * 16 + channel
                        : kTf32               ? (tap * kOutputs + output) * 8 + channel
                                              : (channel * taps + tap) * kOutputs + output;
      to[place] = as_operand<kTf32>(value(output, channel, tap));
    }
  }
};

// sum += the products of a chunk's planes and filters, at the blocks of 16 positions that are this warp's: every
// `warps`-th one. Half types, tf32: the fragments of mma.sync, where the k of a tf32 product is channel 2 k for k < 4, else
// 2 k - 7: so a lane's two channels are neighbours, and the planes' length keeps the lanes apart. float32: two lanes share
// a position, each takes one half of the outputs.
template <class T, int kOctets, bool kTf32 = false>
DNL_DEVICE void conv_products(float (&sum)[kConvBlocksPerWarp][4 * kOctets], const T* planes, const T* filters,
                              const ConvTiling& t, int taps, int blocks) {
  using E = ConvElement<T>;
  using Filters = ConvFilters<T, kOctets, kTf32>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if constexpr (kTf32) {
    const T* from = planes + lane % 4 * 2 * t.length + t.origin + lane / 4;
    const T* filter = filters + lane / 4 * 8 + lane % 4 * 2;
#pragma unroll 1
    for (int tap = 0; tap < taps; tap++, filter += Filters::kOutputs * 8) {
      const T* shifted = from + tap_offset(t, tap);
      float2 b[kOctets];
#pragma unroll
      for (int o = 0; o < kOctets; o++) b[o] = *reinterpret_cast<const float2*>(filter + o * 64);
#pragma unroll
      for (int m = 0; m < kConvBlocksPerWarp; m++) {
        const int block = m * warps + warp;
        if (block >= blocks) break;
        const T* x = shifted + block * 16;
        const float a[4] = {x[0], x[8], x[t.length], x[t.length + 8]};
#pragma unroll
        for (int o = 0; o < kOctets; o++)
          mma_m16n8k8(*reinterpret_cast<float(*)[4]>(&sum[m][4 * o]), a, b[o].x, b[o].y);
      }
    }
  } else if constexpr (E::kHalf) {
    const T* from = planes + (lane / 16 * t.length + t.origin + lane % 16) * 8;
    const T* filter = filters + lane % 8 * Filters::row(taps) + lane / 8 % 2 * 8;
#pragma unroll 1
    for (int tap = 0; tap < taps; tap++) {
      const T* shifted = from + tap_offset(t, tap) * 8;
      uint32_t b[kOctets][2];
#pragma unroll
      for (int o = 0; o < kOctets; o++) ldmatrix(b[o], filter + o * 8 * Filters::row(taps) + tap * 16);
#pragma unroll
      for (int m = 0; m < kConvBlocksPerWarp; m++) {
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
    const int half = lane / 16 * 4 * kOctets;
#pragma unroll 1
    for (int k = 0; k < E::kChunk * taps; k++) {
      const T* from = planes + k / taps * t.length + t.origin + lane % 16 + tap_offset(t, k % taps);
      float w[4 * kOctets];
#pragma unroll
      for (int o = 0; o < 4 * kOctets; o++) w[o] = filters[k * Filters::kOutputs + half + o];
#pragma unroll
      for (int m = 0; m < kConvBlocksPerWarp; m++) {
        const int block = m * warps + warp;
        if (block >= blocks) break;
        const float x = from[block * 16];
#pragma unroll
        for (int o = 0; o < 4 * kOctets; o++) sum[m][o] += w[o] * x;
      }
    }
  }
}

// What a lane holds of block m: calls body(output, position from the tile's first pixel, its sum).
template <class T, int kOctets, bool kTf32 = false, class Body>
DNL_DEVICE void for_each_sum(const float (&sum)[4 * kOctets], int block, Body body) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4 * kOctets; e++) {
    if constexpr (ConvElement<T>::kHalf || kTf32)
      body(e / 4 * 8 + lane % 4 * 2 + e % 2, block * 16 + lane / 4 + e % 4 / 2 * 8, sum[e]);
    else
      body(lane / 16 * 4 * kOctets + e, block * 16 + lane % 16, sum[e]);
  }
}

// Bit k of interior[b]: position 16 b + k of the tile is a pixel, not padding. For the whole block of threads.
DNL_DEVICE void find_interior(uint32_t* interior, const ConvTiling& t, const ConvTile& tile) {
  const int span = t.span(tile.images, tile.rows);
  for (int block = threadIdx.x; block < (span + 15) / 16; block += blockDim.x) {
    uint32_t bits = 0;
    for (int k = 0; k < 16; k++) {
      const int position = block * 16 + k, in_image = position % t.image_pitch;
      bits |= uint32_t(position < span && in_image < tile.rows * t.pitch && in_image % t.pitch < t.width) << k;
    }
    interior[block] = bits;
  }
}

}  // namespace dnl
