// dnl_layer on a GPU, forward: a block of threads makes one sample, from the states to the result, in shared memory.
//
// Between the states and the result a quantity is a row of floats for each channel, with a column for each position. A
// thread owns the columns threadIdx.x, + blockDim.x, ..: what it alone reads and writes needs no barrier. Only keys
// and values (in the backward pass also queries and their gradients) are read across columns. Scores are in base 2.
#pragma once
#include "common/activation.cuh"

namespace dnl {

constexpr int kLayerMaxStates = 128;  // a skip input is one more
constexpr int kLayerThreads = 256;
constexpr int kLayerWidth = 32;  // of a head's queries and values: they are registers of a thread
constexpr int kLayerChunk = 16;  // channels of the states that are accumulated at a time
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
  int positions, columns, stride;  // columns: positions rounded up to 4; stride: between rows, an odd multiple of 4
  int width, result;               // channels of y and of the result
  int heads, query, value;         // widths of a head, and rounded up to 4:
  int query4, value4;
  int count, channels, skip;  // states (the skip input is the last one), channels of the others, of the skip input
  LayerKernel kernel;
  Activation input_activation, activation;
  float tau;
  bool images, residual;
};

struct LayerForward {
  LayerState states[kLayerMaxStates + 1];
  int first[kLayerMaxStates + 2];  // channel of each state, all side by side
  const void* parameters[kLayerParameters];
  void* out;
  LayerSizes sizes;
  bool wide_out;  // 16-byte accesses to the result
};

// Floats of shared memory in the forward pass.
struct LayerLayout {
  int y, z, k, v, weights, total;

  __host__ __device__ explicit LayerLayout(const LayerSizes& s) {
    y = 0;
    z = y + s.width * s.stride;
    k = z + s.result * s.stride;
    v = k + s.query4 * s.stride;
    weights = v + s.value4 * s.stride;
    const int chunks = 2 * s.width * kLayerChunk;
    const int head = (s.width + 1) * (2 * s.query4 + s.value4) + s.result * s.value4;
    total = weights + (chunks > head ? chunks : head);
  }
};

template <class T>
DNL_DEVICE float parameter(const void* data, int64_t i, float absent) {
  return data ? to_float(load_global(static_cast<const T*>(data) + i)) : absent;
}

DNL_DEVICE float4 read4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// row_r[n] += sum_d w[r, d] in[d]; w is [rows, width], width <= kMax a multiple of 4.
template <int kMax>
DNL_DEVICE void scatter(float* column, int stride, int rows, const float* w, int width, const float (&in)[kMax]) {
#pragma unroll 1
  for (int r = 0; r < rows; r++, w += width) {
    float sum = column[r * stride];
#pragma unroll
    for (int d = 0; d < kMax; d += 4)
      if (d < width) {
        const float4 a = read4(w + d);
        sum += a.x * in[d] + a.y * in[d + 1] + a.z * in[d + 2] + a.w * in[d + 3];
      }
    column[r * stride] = sum;
  }
}

// out[d] = bias[d] + sum_r w[r, d] row_r[n].
template <int kMax>
DNL_DEVICE void gather(float (&out)[kMax], const float* column, int stride, int rows, const float* w, int width,
                       const float* bias) {
#pragma unroll
  for (int d = 0; d < kMax; d++) out[d] = bias && d < width ? bias[d] : 0.0f;
#pragma unroll 1
  for (int r = 0; r < rows; r++, w += width) {
    const float x = column[r * stride];
#pragma unroll
    for (int d = 0; d < kMax; d += 4)
      if (d < width) {
        const float4 a = read4(w + d);
        out[d] += a.x * x;
        out[d + 1] += a.y * x;
        out[d + 2] += a.z * x;
        out[d + 3] += a.w * x;
      }
  }
}

// A column of `width` rows, a multiple of 4, to and from registers.
template <int kMax>
DNL_DEVICE void put(float* column, int stride, int width, const float (&in)[kMax]) {
#pragma unroll
  for (int d = 0; d < kMax; d += 4)
    if (d < width)
      for (int i = 0; i < 4; i++) column[(d + i) * stride] = in[d + i];
}

template <int kMax>
DNL_DEVICE void take(float (&out)[kMax], const float* column, int stride, int width) {
#pragma unroll
  for (int d = 0; d < kMax; d += 4)
    for (int i = 0; i < 4; i++) out[d + i] = d < width ? column[(d + i) * stride] : 0.0f;
}

// A channel of the sample's states, as the threads read it.
template <class T>
struct LayerChannel {
  const T* data;  // of position 0; null behind the last channel
  int64_t step;
  float scale, shift;
  bool plain;    // the skip input: neither normalised nor activated
  bool vectors;  // this channel begins a 16-byte pack
};

// The channels of all states side by side, kChunk of them at a time: their table and filters come to shared memory,
// in two buffers in turn, so that one barrier for each chunk is enough.
template <class T, int kChunk>
class LayerChunks {
 public:
  static constexpr int kPack = 16 / sizeof(T) < kChunk ? 16 / sizeof(T) : kChunk;

  DNL_DEVICE LayerChunks(LayerChannel<T>* table, float* filters) : table_(table), filters_(filters) {}

  // Brings in channels [begin, begin + kChunk). Chunks come in ascending order.
  template <class Params>
  DNL_DEVICE void stage(const Params& p, int begin) {
    const LayerSizes& s = p.sizes;
    const int buffer = begin / kChunk % 2, all = s.channels + s.skip, u = threadIdx.x;
    channels = table_ + buffer * kChunk;
    filters = filters_ + buffer * s.width * kChunk;
    if (u < kChunk) {
      const int c = begin + u;
      LayerChannel<T> channel{nullptr, 0, 1.0f, 0.0f, c >= s.channels, false};
      if (c < all) {
        while (c >= p.first[state_ + 1]) state_++;
        const LayerState& state = p.states[state_];
        channel.step = state.step;
        channel.data = static_cast<const T*>(state.data) + blockIdx.x * state.batch_step +
                       (c - p.first[state_]) * state.channel_step;
        channel.vectors = u % kPack == 0 && c + kPack <= p.first[state_ + 1] && state.channel_step == 1 &&
                          reinterpret_cast<uintptr_t>(channel.data) % 16 == 0 && state.step * sizeof(T) % 16 == 0;
        if (!channel.plain) {
          channel.scale = parameter<T>(p.parameters[kNormScale], c, 1.0f);
          channel.shift = parameter<T>(p.parameters[kNormShift], c, 0.0f);
        }
      }
      table_[buffer * kChunk + u] = channel;
    }
    for (int i = threadIdx.x; i < s.width * kChunk; i += blockDim.x) {
      const int64_t g = i / kChunk;
      const int c = begin + i % kChunk;
      float w = 0;
      if (c < s.channels) w = s.tau * parameter<T>(p.parameters[kAffineWeight], g * s.channels + c, 0);
      else if (c < all) w = parameter<T>(p.parameters[kSkipWeight], g * s.skip + c - s.channels, 0);
      filters_[buffer * s.width * kChunk + i] = w;
    }
    __syncthreads();
  }

  // The channels of position n as they lie in the states.
  DNL_DEVICE void load(float (&x)[kChunk], int n) const {
#pragma unroll
    for (int u = 0; u < kChunk; u += kPack) {
      if (channels[u].vectors) {
        const Pack<T, kPack> pack = load_pack<T, kPack>(channels[u].data + n * channels[u].step);
#pragma unroll
        for (int e = 0; e < kPack; e++) x[u + e] = to_float(pack.values[e]);
      } else {
#pragma unroll
        for (int e = u; e < u + kPack; e++)
          x[e] = channels[e].data ? to_float(load_global(channels[e].data + n * channels[e].step)) : 0.0f;
      }
    }
  }

  const LayerChannel<T>* channels;
  const float* filters;  // [width, kChunk], the step included

 private:
  LayerChannel<T>* table_;
  float* filters_;
  int state_ = 0;
};

// y of the sample.
template <class T, class Params>
DNL_DEVICE void accumulate_states(const Params& p, float* y, float* weights) {
  const LayerSizes& s = p.sizes;
  DNL_SHARED(LayerChannel<T>, table, 2 * kLayerChunk);
  LayerChunks<T, kLayerChunk> chunks(table, weights);
  for (int g = 0; g < s.width; g++) {
    const float bias =
        parameter<T>(p.parameters[kAffineBias], g, 0) + parameter<T>(p.parameters[kSkipBias], g, 0);
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x) y[g * s.stride + n] = bias;
  }
  for (int begin = 0; begin < s.channels + s.skip; begin += kLayerChunk) {
    chunks.stage(p, begin);
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
      float x[kLayerChunk];
      chunks.load(x, n);
#pragma unroll
      for (int u = 0; u < kLayerChunk; u++) {
        const LayerChannel<T>& c = chunks.channels[u];
        if (!c.plain) x[u] = activate(s.input_activation, c.scale * x[u] + c.shift);
      }
      scatter(y + n, s.stride, s.width, chunks.filters, kLayerChunk, x);
    }
  }
}

// A head's projections in shared memory, each [inputs, outputs rounded up to 4], padded with zeros.
struct HeadWeights {
  const float *query, *key, *value, *output;  // [width, query4], .., [width, value4], [result, value4]
  const float *query_bias, *key_bias, *value_bias;
};

template <class T, class Params>
DNL_DEVICE HeadWeights stage_head(const Params& p, int head, float* to) {
  const LayerSizes& s = p.sizes;
  // to[g, d] = weight[head * width + d, g], and a last row for the bias.
  auto transposed = [&](int which, int width, int width4) {
    const float* begin = to;
    for (int i = threadIdx.x; i < (s.width + 1) * width4; i += blockDim.x) {
      const int64_t g = i % (s.width + 1), d = i / (s.width + 1), row = static_cast<int64_t>(head) * width + d;
      float w = 0;
      if (d < width)
        w = g < s.width ? parameter<T>(p.parameters[which], row * s.width + g, 0)
                        : parameter<T>(p.parameters[which + 1], row, 0);
      to[g * width4 + d] = w;
    }
    to += (s.width + 1) * width4;
    return begin;
  };
  HeadWeights w;
  w.query = transposed(kQueryWeight, s.query, s.query4);
  w.key = s.kernel == LayerKernel::gaussian ? w.query : transposed(kKeyWeight, s.query, s.query4);
  w.value = transposed(kValueWeight, s.value, s.value4);
  w.query_bias = w.query + s.width * s.query4;
  w.key_bias = w.key + s.width * s.query4;
  w.value_bias = w.value + s.width * s.value4;
  w.output = to;
  for (int i = threadIdx.x; i < s.result * s.value4; i += blockDim.x) {
    const int64_t r = i / s.value4;
    const int e = i % s.value4;
    to[i] = e < s.value ? parameter<T>(p.parameters[kOutputWeight], r * s.heads * s.value + head * s.value + e, 0) : 0;
  }
  return w;
}

// The rows of a projection of y, zeros in the columns that are padding.
DNL_DEVICE void project_rows(const LayerSizes& s, float* rows, const float* y, const float* w, const float* bias,
                             int width4) {
  for (int n = threadIdx.x; n < s.columns; n += blockDim.x) {
    float out[kLayerWidth] = {};
    if (n < s.positions) gather(out, y + n, s.stride, s.width, w, width4, bias);
    put(rows + n, s.stride, width4, out);
  }
}

// What the kernel multiplies its products or squared distances with.
template <class T>
DNL_DEVICE float score_factor(const LayerSizes& s, const void* rho, int head) {
  if (s.kernel == LayerKernel::dot) return 1.0f / static_cast<float>(s.positions);
  if (s.kernel == LayerKernel::softmax) return kLog2E * rsqrtf(static_cast<float>(s.query));
  return -0.5f * kLog2E * expf(-2.0f * parameter<T>(rho, head, 0));
}

// Scores of the vector `a` against columns j .. j + 3 of `rows`; -infinity behind the last position (dot: 0).
DNL_DEVICE void scores4(float (&out)[4], const LayerSizes& s, const float (&a)[kLayerWidth], const float* rows, int j,
                        float factor) {
  float sum[4] = {};
  const bool distances = s.kernel == LayerKernel::gaussian;
#pragma unroll
  for (int d0 = 0; d0 < kLayerWidth; d0 += 4)
    if (d0 < s.query4) {
#pragma unroll
      for (int d = d0; d < d0 + 4; d++) {
        const float4 b = read4(rows + d * s.stride + j);
        if (distances) {
          const float x = a[d] - b.x, y = a[d] - b.y, z = a[d] - b.z, w = a[d] - b.w;
          sum[0] += x * x;
          sum[1] += y * y;
          sum[2] += z * z;
          sum[3] += w * w;
        } else {
          sum[0] += a[d] * b.x;
          sum[1] += a[d] * b.y;
          sum[2] += a[d] * b.z;
          sum[3] += a[d] * b.w;
        }
      }
    }
  const float behind = s.kernel == LayerKernel::dot ? 0.0f : -INFINITY;
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = j + i < s.positions ? sum[i] * factor : behind;
}

// o = sum_j w_j v_j / Z for one query, and the shift by which w = exp2(score - shift) is w / Z (dot: 0).
DNL_DEVICE float attend(float (&o)[kLayerWidth], const LayerSizes& s, const float (&q)[kLayerWidth], const float* k,
                        const float* v, float factor) {
  const bool exponential = s.kernel != LayerKernel::dot;
  float highest = exponential ? -INFINITY : 0.0f, total = 0;
#pragma unroll
  for (int e = 0; e < kLayerWidth; e++) o[e] = 0;
#pragma unroll 1
  for (int j = 0; j < s.positions; j += 4) {
    float w[4];
    scores4(w, s, q, k, j, factor);
    if (exponential) {
      const float high = fmaxf(fmaxf(w[0], w[1]), fmaxf(w[2], w[3]));
      if (high > highest) {
        const float shrink = exp2f(highest - high);
        highest = high;
        total *= shrink;
#pragma unroll
        for (int e = 0; e < kLayerWidth; e++) o[e] *= shrink;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = exp2f(w[i] - highest);
      total += (w[0] + w[1]) + (w[2] + w[3]);
    }
#pragma unroll
    for (int e0 = 0; e0 < kLayerWidth; e0 += 4)
      if (e0 < s.value4) {
#pragma unroll
        for (int e = e0; e < e0 + 4; e++) {
          const float4 x = read4(v + e * s.stride + j);
          o[e] += (w[0] * x.x + w[1] * x.y) + (w[2] * x.z + w[3] * x.w);
        }
      }
  }
  if (!exponential) return 0;
  const float inverse = 1.0f / total;
#pragma unroll
  for (int e = 0; e < kLayerWidth; e++) o[e] *= inverse;
  return highest + log2f(total);
}

// A head's part of z = W_o concat_heads(..), without its bias. It does not depend on the element type.
DNL_DEVICE void attend_head(const LayerSizes& sizes, const HeadWeights& w, const float* y, float* z, float* k,
                                 float* v, float factor) {
  const LayerSizes s = sizes;
  project_rows(s, k, y, w.key, w.key_bias, s.query4);
  project_rows(s, v, y, w.value, w.value_bias, s.value4);
  __syncthreads();
  for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
    float q[kLayerWidth], o[kLayerWidth];
    gather(q, y + n, s.stride, s.width, w.query, s.query4, w.query_bias);
    attend(o, s, q, k, v, factor);
    scatter(z + n, s.stride, s.result, w.output, s.value4, o);
  }
  __syncthreads();
}

template <class T, class Params>
DNL_DEVICE void non_local(const Params& p, const float* y, float* z, float* k, float* v, float* weights) {
  const LayerSizes& s = p.sizes;
  for (int r = 0; r < s.result; r++)
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x) z[r * s.stride + n] = 0;
  __syncthreads();  // the filters of the accumulation are read no more
  for (int head = 0; head < s.heads; head++) {
    const HeadWeights w = stage_head<T>(p, head, weights);
    __syncthreads();
    attend_head(s, w, y, z, k, v, score_factor<T>(s, p.parameters[kRho], head));
  }
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

template <class T, int V, class Params>
DNL_DEVICE void write_result(const Params& p, const float* y, const float* z) {
  const LayerSizes& s = p.sizes;
  const int size = s.result * s.positions;
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(blockIdx.x) * size;
  for (int i = threadIdx.x * V; i < size; i += blockDim.x * V) {
    Pack<T, V> pack;
#pragma unroll
    for (int e = 0; e < V; e++) {
      const int2 at = place_of(s, i + e);
      const float scale = parameter<T>(p.parameters[kOutputScale], at.x, 1);
      const float shift = parameter<T>(p.parameters[kOutputShift], at.x, 0);
      pack.values[e] = from_float<T>(activate(s.activation, scale * non_local_value<T>(p, y, z, at) + shift));
    }
    store_pack(out + i, pack);
  }
}

template <class T>
__global__ void __launch_bounds__(kLayerThreads) dnl_layer_fwd_kernel(const __grid_constant__ LayerForward p) {
  DNL_DYNAMIC_SHARED(float, shared);
  const LayerLayout at(p.sizes);
  float *y = shared + at.y, *z = shared + at.z, *weights = shared + at.weights;
  accumulate_states<T>(p, y, weights);
  non_local<T>(p, y, z, shared + at.k, shared + at.v, weights);
  if (p.wide_out)
    write_result<T, 16 / sizeof(T)>(p, y, z);
  else
    write_result<T, 1>(p, y, z);
}

}  // namespace dnl
