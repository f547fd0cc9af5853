// dnl_layer on a GPU: how a block of threads reads its sample and parameters, and what both kinds of arithmetic share.
#pragma once
#include "dnl_layer/params.h"

namespace dnl {

template <class T>
DNL_DEVICE float parameter(const void* data, int64_t i, float absent) {
  return data ? to_float(load_global(static_cast<const T*>(data) + i)) : absent;
}

// A channel of the sample's states, as the threads read it.
template <class T>
struct LayerChannel {
  const T* data;  // of position 0; null behind the last channel
  int64_t step;
  float scale, shift;
  float factor;  // of its products: the step tau, or 1
  bool plain;    // the skip input: neither normalised nor activated
  bool vectors;  // this channel begins a 16-byte pack
};

// The channels of all states side by side, kChunk of them at a time: their table and filters come to shared memory,
// in two buffers in turn, so that one barrier for each chunk is enough.
template <class T, int kChunk>
class LayerChunks {
 public:
  static constexpr int kPack = 16 / sizeof(T) < kChunk ? 16 / sizeof(T) : kChunk;

  DNL_DEVICE LayerChunks(LayerChannel<T>* table, T* filters) : table_(table), filters_(filters) {}

  // Brings in channels [begin, begin + kChunk). Chunks come in ascending order.
  template <class Params>
  DNL_DEVICE void stage(const Params& p, int begin) {
    const LayerSizes& s = p.sizes;
    const int buffer = begin / kChunk % 2, all = s.channels + s.skip, u = threadIdx.x;
    channels = table_ + buffer * kChunk;
    T* const to = filters_ + buffer * s.width_padded * kChunk;
    filters = to;
    if (u < kChunk) {
      const int c = begin + u;
      LayerChannel<T> channel{nullptr, 0, 1.0f, 0.0f, 1.0f, c >= s.channels, false};
      if (c < all) {
        while (c >= p.first[state_ + 1]) state_++;
        const LayerState& state = p.states[state_];
        channel.step = state.step;
        channel.data = static_cast<const T*>(state.data) + blockIdx.x * state.batch_step +
                       (c - p.first[state_]) * state.channel_step;
        channel.vectors = u % kPack == 0 && c + kPack <= p.first[state_ + 1] && state.channel_step == 1 &&
                          reinterpret_cast<uintptr_t>(channel.data) % 16 == 0 && state.step * sizeof(T) % 16 == 0;
        if (!channel.plain) {
          channel.factor = s.tau;
          channel.scale = parameter<T>(p.parameters[kNormScale], c, 1.0f);
          channel.shift = parameter<T>(p.parameters[kNormShift], c, 0.0f);
        }
      }
      table_[buffer * kChunk + u] = channel;
    }
    for (int i = threadIdx.x; i < s.width_padded * kChunk; i += blockDim.x) {
      const int g = i / kChunk, inside = i % kChunk, c = begin + inside;
      T w = from_float<T>(0.0f);
      if (g < s.width && c < s.channels)
        w = load_global(static_cast<const T*>(p.parameters[kAffineWeight]) + static_cast<int64_t>(g) * s.channels + c);
      else if (g < s.width && c < all)
        w = load_global(static_cast<const T*>(p.parameters[kSkipWeight]) + static_cast<int64_t>(g) * s.skip + c -
                        s.channels);
      to[sizeof(T) == 2 ? (inside / 8 * s.width_padded + g) * 8 + inside % 8 : i] = w;
    }
    __syncthreads();
  }

  // kCount channels of position n from `first` on, as they lie in the states.
  template <int kCount>
  DNL_DEVICE void load(float (&x)[kCount], int n, int first = 0) const {
#pragma unroll
    for (int u = 0; u < kCount; u += kPack) {
      const LayerChannel<T>* c = channels + first + u;
      if (c->vectors) {
        const Pack<T, kPack> pack = load_pack<T, kPack>(c->data + n * c->step);
#pragma unroll
        for (int e = 0; e < kPack; e++) x[u + e] = to_float(pack.values[e]);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; e++) x[u + e] = c[e].data ? to_float(load_global(c[e].data + n * c[e].step)) : 0.0f;
      }
    }
  }

  const LayerChannel<T>* channels;
  const T* filters;  // float32: [width, kChunk]; half types: octets, [kChunk / 8][width][8]

 private:
  LayerChannel<T>* table_;
  T* filters_;
  int state_ = 0;
};

// What the kernel multiplies its products or squared distances with.
template <class T>
DNL_DEVICE float score_factor(const LayerSizes& s, const void* rho, int head) {
  if (s.kernel == LayerKernel::dot) return 1.0f / static_cast<float>(s.positions);
  if (s.kernel == LayerKernel::softmax) return kLog2E * rsqrtf(static_cast<float>(s.query));
  return -0.5f * kLog2E * expf(-2.0f * parameter<T>(rho, head, 0));
}

// Row (channel) and column (position) of the i-th element of a sample of the result.
DNL_DEVICE int2 place_of(const LayerSizes& s, int i) {
  return s.images ? make_int2(i / s.positions, i % s.positions) : make_int2(i % s.result, i / s.result);
}

// N(y) at a place: the output projection's bias and the residual are added.
template <class T, class Params>
DNL_DEVICE float non_local_value(const Params& p, const float* y, const float* z, int2 at) {
  const LayerSizes& s = p.sizes;
  const float value = z[at.x * s.stride + at.y] + parameter<T>(p.parameters[kOutputBias], at.x, 0);
  return s.residual ? value + y[at.x * s.stride + at.y] : value;
}

// to[a] = sum_n row_a[n], a warp for each row.
DNL_DEVICE void row_sums(float* to, const LayerSizes& s, const float* rows, int count) {
  for (int a = threadIdx.x / 32; a < count; a += blockDim.x / 32) {
    float sum = 0;
    for (int n = threadIdx.x % 32; n < s.positions; n += 32) sum += rows[a * s.stride + n];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) store_global(to + a, sum);
  }
}

// Where the gradient of a parameter begins in this sample's partial sums, or null.
DNL_DEVICE float* gradient(const LayerBackward& p, LayerParameter which) {
  if (!p.need_parameters || p.offsets[which] < 0) return nullptr;
  return p.partial + blockIdx.x * p.size + p.offsets[which];
}

// Sets the columns of `width` rows of y to its bias, zero behind the last position.
template <class T, class Params>
DNL_DEVICE void begin_accumulation(const Params& p, float* y) {
  const LayerSizes& s = p.sizes;
  for (int g = 0; g < s.width; g++) {
    const float bias =
        parameter<T>(p.parameters[kAffineBias], g, 0) + parameter<T>(p.parameters[kSkipBias], g, 0);
    for (int n = threadIdx.x; n < s.columns; n += blockDim.x) y[g * s.stride + n] = n < s.positions ? bias : 0.0f;
  }
}

// d score / d product: for the Gaussian the derivative of -|q - k|^2 / (2 h^2) by one difference.
DNL_DEVICE float score_slope(LayerKernel kernel, float factor) {
  return kernel == LayerKernel::dot ? factor : (kernel == LayerKernel::gaussian ? -2.0f : 1.0f) * kLn2 * factor;
}

// Where dx of a channel and position belongs; `state` is not behind the channel's own.
DNL_DEVICE int64_t place_in_state(const LayerBackward& p, int& state, int channel, int n) {
  while (channel >= p.first[state + 1]) state++;
  const LayerSizes& s = p.sizes;
  const int64_t channels = p.first[state + 1] - p.first[state], own = channel - p.first[state];
  return s.images ? (blockIdx.x * channels + own) * s.positions + n
                  : (static_cast<int64_t>(blockIdx.x) * s.positions + n) * channels + own;
}

}  // namespace dnl
