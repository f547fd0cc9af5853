// dense_sum on a GPU: every state and gradient passes once, in accesses of 16 bytes where alignment allows.
//
// States are contiguous, seen as [outer, channels, inner]. A pack of V elements lies in one channel (kAcross = false) or
// runs across V channels of a channels-last tensor (kAcross = true, inner = 1).
#pragma once
#include "common/device.cuh"

namespace dnl {

constexpr int kDenseSumMaxStates = 256;  // their pointers travel in the launch's parameters
constexpr int kDenseSumThreads = 256, kDenseSumWarps = kDenseSumThreads / 32;
constexpr int kDenseSumPacks = 4;  // of dy, kept in a thread's registers by the backward

struct DenseSumSizes {
  int64_t outer, channels, inner;
  int count;
};

struct DenseSumForward {
  const void* states[kDenseSumMaxStates];
  const void* weight;  // [count, channels]
  void* y;
  DenseSumSizes sizes;
};

struct DenseSumBackward {
  const void* states[kDenseSumMaxStates];
  void* dstates[kDenseSumMaxStates];
  const void* dy;
  const void* weight;
  float* partial;  // [count, channels, tiles]
  int64_t tiles;   // of a channel (kAcross: of a group of channels)
  DenseSumSizes sizes;
  bool need_states, need_weight;
};

// The weights of the V elements that begin at channel c.
template <class T, int V, bool kAcross>
DNL_DEVICE void load_weights(float (&w)[V], const T* weight, int64_t channel) {
  if constexpr (kAcross) {
    const Pack<T, V> pack = load_pack<T, V>(weight + channel);
#pragma unroll
    for (int e = 0; e < V; e++) w[e] = to_float(pack.values[e]);
  } else {
    const float one = to_float(load_global(weight + channel));
#pragma unroll
    for (int e = 0; e < V; e++) w[e] = one;
  }
}

template <class T, int V, bool kAcross>
__global__ void __launch_bounds__(kDenseSumThreads) dense_sum_fwd_kernel(const __grid_constant__ DenseSumForward p) {
  const DenseSumSizes& s = p.sizes;
  const int64_t numel = s.outer * s.channels * s.inner;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kDenseSumThreads + threadIdx.x) * V;
  if (i >= numel) return;
  const int64_t channel = i / s.inner % s.channels;
  float y[V] = {};
#pragma unroll 4
  for (int j = 0; j < s.count; j++) {
    float w[V];
    load_weights<T, V, kAcross>(w, static_cast<const T*>(p.weight) + j * s.channels, channel);
    const Pack<T, V> x = load_pack<T, V>(static_cast<const T*>(p.states[j]) + i);
#pragma unroll
    for (int e = 0; e < V; e++) y[e] += w[e] * to_float(x.values[e]);
  }
  Pack<T, V> out;
#pragma unroll
  for (int e = 0; e < V; e++) out.values[e] = from_float<T>(y[e]);
  store_pack(static_cast<T*>(p.y) + i, out);
}

// Where the packs of a block's tile lie. kAcross: 32 packs of channels by rows; otherwise one channel by positions
// (outer, inner).
template <int V, bool kAcross>
struct DenseSumTile {
  static constexpr int64_t kLength = kAcross ? kDenseSumWarps * kDenseSumPacks  // rows
                                             : kDenseSumThreads * kDenseSumPacks * V;  // positions
  static constexpr int kColumns = kAcross ? 32 * V : 1;  // channels
  int64_t number, first_channel, channel;  // channel: of this thread's packs

  DNL_DEVICE explicit DenseSumTile(int64_t tiles)
      : number(blockIdx.x % tiles),
        first_channel(blockIdx.x / tiles * kColumns),
        channel(first_channel + (kAcross ? threadIdx.x % 32 * V : 0)) {}

  // The offset of this thread's k-th pack, or -1 where the tile ends before it.
  DNL_DEVICE int64_t offset(const DenseSumSizes& s, int k) const {
    if constexpr (kAcross) {
      const int64_t row = number * kLength + k * kDenseSumWarps + threadIdx.x / 32;
      return row < s.outer && channel < s.channels ? row * s.channels + channel : -1;
    } else {
      const int64_t position = number * kLength + (k * kDenseSumThreads + static_cast<int>(threadIdx.x)) * V;
      if (position >= s.outer * s.inner) return -1;
      return (position / s.inner * s.channels + channel) * s.inner + position % s.inner;
    }
  }
};

template <class T, int V, bool kAcross>
__global__ void __launch_bounds__(kDenseSumThreads, 3)  // without the 3, ptxas spills for more warps on some architectures
    dense_sum_bwd_kernel(const __grid_constant__ DenseSumBackward p) {
  const DenseSumSizes& s = p.sizes;
  using Tile = DenseSumTile<V, kAcross>;
  const Tile tile(p.tiles);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kColumns = Tile::kColumns;
  DNL_SHARED(float, sums, 2 * kDenseSumWarps * kColumns);
  Pack<T, V> dy[kDenseSumPacks];
  int64_t offsets[kDenseSumPacks];
#pragma unroll
  for (int k = 0; k < kDenseSumPacks; k++) {
    offsets[k] = tile.offset(s, k);
    if (offsets[k] >= 0) dy[k] = load_pack<T, V>(static_cast<const T*>(p.dy) + offsets[k]);
  }
  for (int j = 0; j < s.count; j++) {
    float w[V] = {}, dw[V] = {};
    if (p.need_states && offsets[0] >= 0)
      load_weights<T, V, kAcross>(w, static_cast<const T*>(p.weight) + j * s.channels, tile.channel);
#pragma unroll
    for (int k = 0; k < kDenseSumPacks; k++) {
      if (offsets[k] < 0) continue;
      Pack<T, V> x{};
      if (p.need_weight) x = load_pack<T, V>(static_cast<const T*>(p.states[j]) + offsets[k]);
      Pack<T, V> out;
#pragma unroll
      for (int e = 0; e < V; e++) {
        const float g = to_float(dy[k].values[e]);
        dw[e] += g * to_float(x.values[e]);
        out.values[e] = from_float<T>(w[e] * g);
      }
      if (p.need_states) store_pack(static_cast<T*>(p.dstates[j]) + offsets[k], out);
    }
    if (!p.need_weight) continue;
    // The tile's sum, in a fixed order. Two buffers in turn: one barrier per state.
    float* buffer = sums + j % 2 * kDenseSumWarps * kColumns;
    if constexpr (kAcross) {
#pragma unroll
      for (int e = 0; e < V; e++) buffer[warp * kColumns + lane * V + e] = dw[e];
    } else {
      float all = 0;
#pragma unroll
      for (int e = 0; e < V; e++) all += dw[e];
      all = warp_sum(all);
      if (lane == 0) buffer[warp] = all;
    }
    __syncthreads();
    for (int column = threadIdx.x; column < kColumns; column += kDenseSumThreads) {
      const int64_t channel = tile.first_channel + column;
      if (channel >= s.channels) continue;
      float all = 0;
      for (int v = 0; v < kDenseSumWarps; v++) all += buffer[v * kColumns + column];
      store_global(p.partial + (j * s.channels + channel) * p.tiles + tile.number, all);
    }
  }
}

// out[r] = sum of partial[r, 0..tiles), one warp for each r.
template <class T>
__global__ void __launch_bounds__(kDenseSumThreads) sum_partials_kernel(const float* partial, T* out, int64_t rows,
                                                                        int64_t tiles) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDenseSumWarps + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0;
  for (int64_t t = threadIdx.x % 32; t < tiles; t += 32) sum += load_global(partial + row * tiles + t);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) store_global(out + row, from_float<T>(sum));
}

}  // namespace dnl
