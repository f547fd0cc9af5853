// dense_conv2d on a GPU, backward: one kernel makes every gradient of a tile, chunk of channels by chunk of channels.
//
// With u = norm_scale x + norm_shift, a = act(u) and v = scale * (transposed convolution of dy): g = v act'(u) gives
// dx = norm_scale g, dnorm_shift = sum g, dnorm_scale = sum g x; the weight gradient is a^T dy for each tap. dy of the
// tile and of its neighbours stays in shared memory for all chunks, x of a chunk is read once, dx takes its place.
// Sums of a block of threads go to its own row of partial sums; dense_conv2d_reduce_kernel adds the rows in order.
#pragma once
#include "dense_conv2d/kernel.cuh"

namespace dnl {

constexpr int kConvMaxTaps = 9;  // their weight gradients are in registers
constexpr int kConvPair = 2;      // blocks of positions that share the filters' fragments

// Shared memory of the backward kernel, in elements of T from its start.
template <class T, bool kTf32>
struct ConvBackwardShared {
  static constexpr int kSlots = 4;
  int dy, activated, x, filters, slots, total;  // slots: where warps add up their fragments
  int octets, products, filter_row;  // products: pairs of (tap, octet), the k = 16 of an mma
  DNL_EITHER ConvBackwardShared(int length, int outputs, int taps) {
    constexpr int kChunk = 32 / sizeof(T);
    octets = (outputs + 7) / 8;
    products = (taps * octets + 1) / 2;
    filter_row = 16 * products + 8;
    dy = 0;
    activated = dy + 8 * octets * length;
    x = activated + kChunk * length;
    filters = x + kChunk * length;
    slots = filters + (sizeof(T) == 2 ? kChunk * filter_row : kChunk * 8 * octets * taps);
    total = slots + (in_place() ? 0 : kSlots * slot(taps) * 4 / static_cast<int>(sizeof(T)));
  }
  // Whether there are no slots, or they lie in `activated`, which is used no more.
  DNL_EITHER bool in_place() const { return !kTensorCores || octets == 1; }
  static constexpr bool kTensorCores = sizeof(T) == 2 || kTf32;
  DNL_EITHER static constexpr int fragments(int taps) { return kTf32 ? (taps + 1) / 2 : taps; }  // of a weight gradient
  DNL_EITHER static int slot(int taps) { return 128 * fragments(taps); }  // floats
};

// Adds to this block's own row of partial sums; `fresh`: nothing is there yet.
DNL_DEVICE void add_partial(float* p, float value, bool fresh) {
  store_global(p, fresh ? value : value + load_own(p));
}

// The filters of a chunk for the transposed convolution. Half types: [channel][(tap, octet), 8 outputs]; float32:
// [output][tap][channel]; tf32: [(tap, octet)][channel][8 outputs].
template <class T, bool kTf32>
DNL_DEVICE void load_transposed(T* to, const ConvCommon& p, const ConvBackwardShared<T, kTf32>& shared, int first) {
  constexpr int kChunk = ConvElement<T>::kChunk;
  const int inner = kChunk * p.taps, outputs = 8 * shared.octets;
  for (int i = threadIdx.x; i < outputs * inner; i += blockDim.x) {
    const int output = i / inner, channel = i % inner / p.taps, tap = i % p.taps;
    T value = from_float<T>(0.0f);
    if (output < p.outputs && first + channel < p.channels)
      value = load_global(static_cast<const T*>(p.weight) +
                          (static_cast<int64_t>(output) * p.channels + first) * p.taps + i % inner);
    if constexpr (ConvElement<T>::kHalf)
      to[channel * shared.filter_row + (tap * shared.octets + output / 8) * 8 + output % 8] = value;
    else if constexpr (kTf32)
      to[((tap * shared.octets + output / 8) * kChunk + channel) * 8 + output % 8] = to_tf32(value);
    else
      to[(output * p.taps + tap) * kChunk + channel] = value;
  }
}

// v at positions of the tile, times act'(u): sums g and g x, and leaves dx in the place of x. Half types: lane l holds
// channels 2 (l % 4) and + 1 of each octet; float32: two lanes share a position, each takes four channels; tf32: as half
// types, of one octet.
template <class T, bool kTf32>
DNL_DEVICE void pull_back(const ConvBackward& p, const ConvBackwardShared<T, kTf32>& shared, const ConvPlane<T>* table,
                          const T* dy, T* x, const T* filters, const int* group_offsets, const uint32_t* interior,
                          int blocks, float* scratch) {
  using E = ConvElement<T>;
  constexpr bool kFragments = E::kHalf || kTf32;  // as mma.sync leaves them
  constexpr int kMine = kTf32 ? 2 : 4;             // channels of a lane
  const ConvTiling& t = p.tiling;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto channel_of = [&](int k) { return kFragments ? k / 2 * 8 + lane % 4 * 2 + k % 2 : lane / 16 * 4 + k; };
  float scale[kMine], shift[kMine], sums[kMine] = {}, moments[kMine] = {};
#pragma unroll
  for (int k = 0; k < kMine; k++) {
    scale[k] = table[channel_of(k)].scale;
    shift[k] = table[channel_of(k)].shift;
  }
  // From v and x of some positions, [..][kMine], to dx in the place of x.
  const auto finish = [&](const auto& v, auto& xs) {
    constexpr int kCount = sizeof(xs) / sizeof(xs[0]);
    float slope[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i++) slope[i] = scale[i % kMine] * xs[i] + shift[i % kMine];
    for_all(p.activation, slope, [](Activation which, float u) { return activation_slope(which, u); });
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float g = p.scale * v[i] * slope[i];
      sums[i % kMine] += g;
      moments[i % kMine] += g * xs[i];
      xs[i] = g * scale[i % kMine];
    }
  };
  for (int block = warp * kConvPair; block < blocks; block += warps * kConvPair) {
    if constexpr (E::kHalf) {
      float v[kConvPair][2][4] = {};
      const T* filter = filters + (lane / 16 * 8 + lane % 8) * shared.filter_row + lane / 8 % 2 * 8;
#pragma unroll 1
      for (int product = 0; product < shared.products; product++) {
        uint32_t b[4];
        ldmatrix(b, filter + product * 16);
        const T* from = dy + (group_offsets[2 * product + lane / 16] + t.origin + block * 16 + lane % 16) * 8;
#pragma unroll
        for (int m = 0; m < kConvPair; m++) {
          if (block + m >= blocks) break;
          uint32_t a[4];
          ldmatrix(a, from + m * 16 * 8);
          mma_m16n8k16<T>(v[m][0], a, b[0], b[1]);
          mma_m16n8k16<T>(v[m][1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < kConvPair; m++) {
        if (block + m >= blocks) break;
        // Two positions, g and g + 8, by two octets, by two channels; outside of the images v counts as 0.
        float xs[2][kMine], vs[2][kMine];
        const auto word = [&](int half, int octet) {
          const int position = t.origin + (block + m) * 16 + lane / 4 + half * 8;
          return reinterpret_cast<uint32_t*>(x + (octet * t.length + position) * 8 + lane % 4 * 2);
        };
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int half = i / 2, octet = i % 2;
          const bool inside = interior[block + m] >> (lane / 4 + half * 8) & 1;
          const float2 pair = unpack<T>(*word(half, octet));
          xs[half][2 * octet] = inside ? pair.x : 0.0f;
          xs[half][2 * octet + 1] = inside ? pair.y : 0.0f;
          vs[half][2 * octet] = inside ? v[m][octet][2 * half] : 0.0f;
          vs[half][2 * octet + 1] = inside ? v[m][octet][2 * half + 1] : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) finish(vs[half], xs[half]);
#pragma unroll
        for (int i = 0; i < 4; i++) *word(i / 2, i % 2) = pack<T>(xs[i / 2][i % 2 * 2], xs[i / 2][i % 2 * 2 + 1]);
      }
    } else if constexpr (kTf32) {
      float v[kConvPair][4] = {};
      const T* filter = filters + lane / 4 * 8 + lane % 4 * 2;
#pragma unroll 1
      for (int product = 0; product < p.taps * shared.octets; product++, filter += E::kChunk * 8) {
        const float2 b = *reinterpret_cast<const float2*>(filter);
        const T* from = dy + group_offsets[product] + lane % 4 * 2 * t.length + t.origin + block * 16 + lane / 4;
#pragma unroll
        for (int m = 0; m < kConvPair; m++) {
          if (block + m >= blocks) break;
          const T* g = from + m * 16;
          const float a[4] = {g[0], g[8], g[t.length], g[t.length + 8]};
          mma_m16n8k8(v[m], a, b.x, b.y);
        }
      }
#pragma unroll
      for (int m = 0; m < kConvPair; m++) {
        if (block + m >= blocks) break;
        // Two positions, g and g + 8, by two channels; outside of the images v counts as 0.
        float xs[2][kMine], vs[2][kMine];
        const auto place = [&](int i) -> T& {
          return x[channel_of(i % 2) * t.length + t.origin + (block + m) * 16 + lane / 4 + i / 2 * 8];
        };
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const bool inside = interior[block + m] >> (lane / 4 + i / 2 * 8) & 1;
          xs[i / 2][i % 2] = inside ? place(i) : 0.0f;
          vs[i / 2][i % 2] = inside ? v[m][i] : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) finish(vs[half], xs[half]);
#pragma unroll
        for (int i = 0; i < 4; i++) place(i) = xs[i / 2][i % 2];
      }
    } else {
      float v[kConvPair][kMine] = {};
      const T* filter = filters + lane / 16 * 4;
#pragma unroll 1
      for (int output = 0; output < p.outputs; output++)
#pragma unroll 1
        for (int tap = 0; tap < p.taps; tap++, filter += E::kChunk) {
          const T* from = dy + output * t.length + t.origin + block * 16 + lane % 16 - tap_offset(t, tap);
          const Pack<T, 4> w = *reinterpret_cast<const Pack<T, 4>*>(filter);
#pragma unroll
          for (int m = 0; m < kConvPair; m++) {
            if (block + m >= blocks) break;
#pragma unroll
            for (int k = 0; k < kMine; k++) v[m][k] += w.values[k] * from[m * 16];
          }
        }
#pragma unroll
      for (int m = 0; m < kConvPair; m++) {
        if (block + m >= blocks || !(interior[block + m] >> (lane % 16) & 1)) continue;
        float xs[kMine];
        const auto place = [&](int k) -> T& {
          return x[channel_of(k) * t.length + t.origin + (block + m) * 16 + lane % 16];
        };
#pragma unroll
        for (int k = 0; k < kMine; k++) xs[k] = place(k);
        finish(v[m], xs);
#pragma unroll
        for (int k = 0; k < kMine; k++) place(k) = xs[k];
      }
    }
  }
  if (!p.need_norm) return;
#pragma unroll
  for (int k = 0; k < kMine; k++) {  // over the lanes that hold the same channels
#pragma unroll
    for (int bit = kFragments ? 16 : 8; bit >= (kFragments ? 4 : 1); bit /= 2) {
      sums[k] += __shfl_xor_sync(kFullWarp, sums[k], bit);
      moments[k] += __shfl_xor_sync(kFullWarp, moments[k], bit);
    }
    if (kFragments ? lane < 4 : lane % 16 == 0) {
      scratch[(warp * E::kChunk + channel_of(k)) * 2] = sums[k];
      scratch[(warp * E::kChunk + channel_of(k)) * 2 + 1] = moments[k];
    }
  }
}

// The weight gradient of a chunk and one octet of outputs. Half types, tf32: warps share the positions, then add their
// fragments in a fixed order through `slots`; float32: a warp takes a channel. The 16 rows of a fragment are the chunk's
// channels for one tap; of tf32, its 8 channels for two taps.
template <class T, bool kTf32>
DNL_DEVICE void weight_gradient(const ConvBackward& p, const T* activated, const T* dy, const uint32_t* interior,
                                int blocks, float* slots, int slot_count, float* partial, int first_channel,
                                int first_output, bool fresh) {
  using E = ConvElement<T>;
  const ConvTiling& t = p.tiling;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int taps = p.taps;
  const auto add = [&](int channel, int output, int tap, float value) {
    channel += first_channel;
    output += first_output;
    if (channel < p.channels && output < p.outputs)
      add_partial(partial + (static_cast<int64_t>(output) * p.channels + channel) * taps + tap, value, fresh);
  };
  if constexpr (E::kHalf || kTf32) {
    using Shared = ConvBackwardShared<T, kTf32>;
    constexpr int kMost = Shared::fragments(kConvMaxTaps);
    const int fragments = Shared::fragments(taps);
    float sum[kMost][4] = {};
    if constexpr (kTf32) {
      const T* from = activated + lane / 4 * t.length + t.origin + lane % 4;
      const T* gradient = dy + lane / 4 * t.length + t.origin + lane % 4;
      for (int block = warp; block < blocks; block += warps) {
        float b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = gradient[block * 16 + 4 * i];
        if (block == blocks - 1) {  // what follows the last pixel may be a neighbour's
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (!(interior[block] >> (4 * i + lane % 4) & 1)) b[i] = 0;
        }
#pragma unroll
        for (int k = 0; k < kMost; k++) {
          if (k >= fragments) break;
          const T* x = from + block * 16;
          const int low = tap_offset(t, 2 * k), high = tap_offset(t, 2 * k + 1 < taps ? 2 * k + 1 : 2 * k);
#pragma unroll
          for (int half = 0; half < 16; half += 8) {
            const float a[4] = {x[low + half], x[high + half], x[low + half + 4], x[high + half + 4]};
            mma_m16n8k8(sum[k], a, b[half / 4], b[half / 4 + 1]);
          }
        }
      }
    } else {
      const T* from = activated + (lane / 8 % 2 * t.length + t.origin + lane / 16 * 8 + lane % 8) * 8;
      for (int block = warp; block < blocks; block += warps) {
        uint32_t b[2];
        ldmatrix<2, true>(b, dy + (t.origin + block * 16 + lane % 16) * 8);
        if (block == blocks - 1) {  // what follows the last pixel may be a neighbour's
          const uint32_t inside = interior[block] >> (lane % 4 * 2);
          b[0] &= (inside & 1 ? 0xffffu : 0u) | (inside & 2 ? 0xffff0000u : 0u);
          b[1] &= (inside & 0x100 ? 0xffffu : 0u) | (inside & 0x200 ? 0xffff0000u : 0u);
        }
#pragma unroll
        for (int k = 0; k < kConvMaxTaps; k++) {
          if (k >= taps) break;
          uint32_t a[4];
          ldmatrix<4, true>(a, from + (block * 16 + tap_offset(t, k)) * 8);
          mma_m16n8k16<T>(sum[k], a, b[0], b[1]);
        }
      }
    }
    __syncthreads();  // everyone is done with `activated`, where the slots may lie
    for (int alive = warps; alive > 1;) {
      const int kept = alive - (alive / 2 < slot_count ? alive / 2 : slot_count);
      float* slot = slots + (warp >= kept ? warp - kept : warp) * fragments * 128 + lane * 4;
      if (warp >= kept && warp < alive) {
#pragma unroll
        for (int k = 0; k < kMost; k++)
          if (k < fragments)
            *reinterpret_cast<Pack<float, 4>*>(slot + k * 128) = {{sum[k][0], sum[k][1], sum[k][2], sum[k][3]}};
      }
      __syncthreads();
      if (warp < alive - kept) {
#pragma unroll
        for (int k = 0; k < kMost; k++) {
          if (k >= fragments) break;
          const Pack<float, 4> other = *reinterpret_cast<const Pack<float, 4>*>(slot + k * 128);
#pragma unroll
          for (int e = 0; e < 4; e++) sum[k][e] += other.values[e];
        }
      }
      __syncthreads();
      alive = kept;
    }
    if (warp == 0) {
#pragma unroll
      for (int k = 0; k < kMost; k++) {
        if (k >= fragments) break;
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int tap = kTf32 ? 2 * k + e / 2 : k;
          if (tap < taps) add(lane / 4 + (kTf32 ? 0 : e / 2 * 8), lane % 4 * 2 + e % 2, tap, sum[k][e]);
        }
      }
    }
  } else {
    for (int channel = warp; channel < E::kChunk; channel += warps) {
      float sum[kConvMaxTaps][8] = {};
      const T* from = activated + channel * t.length + t.origin;
      for (int position = lane; position < blocks * 16; position += 32) {
        if (!(interior[position / 16] >> (position % 16) & 1)) continue;
        float d[8];
#pragma unroll
        for (int o = 0; o < 8; o++) d[o] = dy[o * t.length + t.origin + position];
#pragma unroll
        for (int k = 0; k < kConvMaxTaps; k++) {
          if (k >= taps) break;
          const float a = from[position + tap_offset(t, k)];
#pragma unroll
          for (int o = 0; o < 8; o++) sum[k][o] += a * d[o];
        }
      }
#pragma unroll
      for (int k = 0; k < kConvMaxTaps; k++) {
        if (k >= taps) break;
        float mine = 0;
#pragma unroll
        for (int o = 0; o < 8; o++) {
          const float all = warp_sum(sum[k][o]);
          if (lane == o) mine = all;
        }
        if (lane < 8) add(channel, lane, k, mine);
      }
    }
  }
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(32 * kConvMaxWarps, 1)
    dense_conv2d_bwd_kernel(const __grid_constant__ ConvBackward p) {
  using E = ConvElement<T>;
  constexpr int kMaxGroups = kConvMaxOutputs / 8 * kConvMaxTaps + 1;
  DNL_SHARED(ConvPlane<T>, table, E::kChunk);
  DNL_SHARED(float, scratch, 2 * E::kChunk * kConvMaxWarps);
  DNL_SHARED(int, group_offsets, kMaxGroups);
  DNL_SHARED(uint32_t, interior, kConvSharedBytes / (80 * 16));  // a bit for each position of a block of 16
  static_assert(kConvSharedBytes + sizeof table + sizeof scratch + sizeof group_offsets + sizeof interior <= 99 << 10);
  DNL_DYNAMIC_SHARED(T, memory);
  const ConvTiling& t = p.tiling;
  const ConvBackwardShared<T, kTf32> shared(t.length, p.outputs, p.taps);
  T *dy = memory + shared.dy, *activated = memory + shared.activated, *x = memory + shared.x;
  T* filters = memory + shared.filters;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool pull = p.need_states || p.need_norm;
  float* const partial = p.partial.data + blockIdx.x * p.partial.row;
  for (int i = threadIdx.x; i < 2 * shared.products; i += blockDim.x) {
    const int tap = i / shared.octets;  // the last one may be a filler whose filter is 0
    group_offsets[i] = tap < p.taps ? i % shared.octets * (kTf32 ? 8 : 1) * t.length - tap_offset(t, tap) : 0;
  }

  for (int64_t number = blockIdx.x; number < t.tiles(); number += gridDim.x) {
    const bool fresh = number == blockIdx.x;
    const ConvTile tile(t, number);
    const int span = t.span(tile.images, tile.rows), blocks = (span + 15) / 16;
    __syncthreads();  // the previous tile is done with
    fill_zero(memory, shared.total * sizeof(T));
    find_interior(interior, t, tile);
    for (int first = 0; first < p.outputs; first += E::kChunk) {  // dy: as a state without a prologue
      if (first) __syncthreads();
      if (threadIdx.x < E::kChunk) {
        const int64_t pixels = static_cast<int64_t>(t.height) * t.width;
        const int output = first + threadIdx.x;
        ConvPlane<T> plane{};
        if (output < p.outputs)
          plane.data = static_cast<const T*>(p.dy) + (tile.image * p.outputs + output) * pixels + tile.row * t.width;
        plane.image_step = p.outputs * pixels;
        table[threadIdx.x] = plane;
      }
      __syncthreads();
      const int count = 8 * shared.octets - first < E::kChunk ? 8 * shared.octets - first : E::kChunk;
      stage<T>(dy + first * t.length, nullptr, table, count / E::kGroup, t, tile, Activation{ActivationKind::identity, 0}, false,
               p.dy_vectors);
    }
    __syncthreads();
    for (int output = warp; output < p.outputs; output += warps) {
      float sum = 0;
      for (int i = lane; i < blocks * 16; i += 32)
        if (interior[i / 16] >> (i % 16) & 1)
          sum += to_float(at_position(dy, t.length, output / E::kGroup, t.origin + i)[output % E::kGroup]);
      sum = warp_sum(sum);
      if (lane == 0) add_partial(partial + p.partial.weights + p.partial.moments + output, sum, fresh);
    }
    if constexpr (kTf32) {  // an operand from here on
      __syncthreads();
      for (int i = threadIdx.x; i < 8 * shared.octets * t.length; i += blockDim.x) dy[i] = to_tf32(dy[i]);
    }

    for (int first = 0; first < p.channels; first += E::kChunk) {
      find_planes<T>(table, p, p.need_states ? p.dstates : nullptr, tile, first);
      if (first && shared.kTensorCores && shared.in_place()) fill_zero(activated, E::kChunk * t.length * sizeof(T));
      __syncthreads();
      stage<T, kTf32>(activated, x, table, E::kGroups, t, tile, p.activation, true, p.vectors);
      if (pull) load_transposed<T, kTf32>(filters, p, shared, first);
      __syncthreads();
      if (pull) pull_back<T, kTf32>(p, shared, table, dy, x, filters, group_offsets, interior, blocks, scratch);
      for (int octet = 0; p.need_weight && octet < shared.octets; octet++)
        weight_gradient<T, kTf32>(p, activated, dy + octet * 8 * t.length, interior, blocks,
                           reinterpret_cast<float*>(shared.in_place() ? activated : memory + shared.slots),
                           shared.in_place() ? kConvMaxWarps : shared.kSlots,
                           partial, first, octet * 8, fresh);
      __syncthreads();
      if (p.need_norm && threadIdx.x < 2 * E::kChunk && first + static_cast<int>(threadIdx.x) / 2 < p.channels) {
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += scratch[w * 2 * E::kChunk + threadIdx.x];
        add_partial(partial + p.partial.weights + first * 2 + threadIdx.x, sum, fresh);
      }
      if (p.need_states)
        for_each_run<T>(t, tile, E::kGroups, 0, [&](int group, int image, int row, int column) {
          const int count = t.width - column < E::kPixels ? t.width - column : E::kPixels;
          float v[E::kGroup][E::kPixels] = {};
          get_run<T>(v, x, t.length, group, t.origin + image * t.image_pitch + row * t.pitch + column, count);
#pragma unroll
          for (int k = 0; k < E::kGroup; k++) {
            const ConvPlane<T>& plane = table[group * E::kGroup + k];
            if (plane.gradient)
              store_pixels<T>(plane.gradient + image * plane.gradient_step + row * t.width + column, v[k], count,
                              t.width % E::kPixels == 0);
          }
        });
      __syncthreads();  // the table and x are free
    }
  }
}

// Every gradient that is a sum over tiles: 32 elements a block, 8 warps share the rows of partial sums.
template <class T>
__global__ void __launch_bounds__(256) dense_conv2d_reduce_kernel(const ConvReduce p) {
  DNL_SHARED(float, sums, 256);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (element < p.partial.row) {
#pragma unroll 4
    for (int64_t r = warp; r < p.rows; r += 8) sum += load_global(p.partial.data + r * p.partial.row + element);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp || element >= p.partial.row) return;
  for (int w = 1; w < 8; w++) sum += sums[w * 32 + lane];
  int64_t i = element;
  if (i < p.partial.weights) {
    if (p.weight) store_global(static_cast<T*>(p.weight) + i, from_float<T>(p.scale * sum));
    return;
  }
  i -= p.partial.weights;
  if (i >= p.partial.moments + p.outputs) return;
  T* to = static_cast<T*>(i >= p.partial.moments ? p.bias : i % 2 ? p.norm_scale : p.norm_shift);
  if (to) store_global(to + (i >= p.partial.moments ? i - p.partial.moments : i / 2), from_float<T>(sum));
}

}  // namespace dnl
