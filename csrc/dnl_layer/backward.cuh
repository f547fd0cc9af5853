// dnl_layer on a GPU, backward: a block of threads makes every gradient of one sample; nothing but the inputs was kept.
//
// The forward pass runs again, up to N(y); then each head again with its gradients. The gradients of the parameters are
// sums over positions, written for each sample, and added over the samples in their order by a second kernel.
#pragma once
#include "dnl_layer/kernel.cuh"

namespace dnl {

constexpr int kLayerBackwardChunk = 8;

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

// Floats of shared memory in the backward pass. Rows from q on are used anew for each head, and before and after them.
struct LayerBackwardLayout {
  int y, dz, dy, q, k, v, dout, t, shift, delta, drho, weights, total;

  __host__ __device__ explicit LayerBackwardLayout(const LayerSizes& s, bool norm, bool output_norm) {
    const int wider = s.query4 > s.value4 ? s.query4 : s.value4;
    y = 0;
    dz = y + s.width * s.stride;
    dy = dz + s.result * s.stride;
    q = dy + s.width * s.stride;
    k = s.kernel == LayerKernel::gaussian ? q : q + s.query4 * s.stride;  // the same projection
    v = k + s.query4 * s.stride;
    dout = v + s.value4 * s.stride;
    t = dout + s.value4 * s.stride;
    shift = t + wider * s.stride;
    delta = shift + s.stride;
    drho = delta + s.stride;
    weights = drho + s.stride;
    const int chunk_rows = (norm ? 3 : 1) * kLayerBackwardChunk, output_rows = output_norm ? 2 * s.result : 0;
    const int rows = q + (chunk_rows > output_rows ? chunk_rows : output_rows) * s.stride;
    if (weights < rows) weights = rows;
    total = weights + (LayerLayout(s).total - LayerLayout(s).weights);
  }
};

// to[a * step + b] = factor * sum_n left_a[n] right_b[n].
DNL_DEVICE void outer(float* to, int step, const LayerSizes& s, const float* left, int a_count, const float* right,
                           int b_count, float factor = 1.0f) {
  const int whole = s.positions & ~3;
  for (int i = threadIdx.x; i < a_count * b_count; i += blockDim.x) {
    const int a = i / b_count, b = i % b_count;
    const float *x = left + a * s.stride, *y = right + b * s.stride;
    float sum = 0;
    for (int n = 0; n < whole; n += 4) {
      const float4 u = read4(x + n), w = read4(y + n);
      sum += (u.x * w.x + u.y * w.y) + (u.z * w.z + u.w * w.w);
    }
    for (int n = whole; n < s.positions; n++) sum += x[n] * y[n];
    store_global(to + static_cast<int64_t>(a) * step + b, factor * sum);
  }
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

// z -> dz, the gradient of N(y) + its bias (+ y); rows of products for the output's scale and shift.
template <class T, int V>
DNL_DEVICE void output_gradient(const LayerBackward& p, const float* y, float* z, float* rows) {
  const LayerSizes& s = p.sizes;
  const int size = s.result * s.positions;
  const bool scaled = gradient(p, kOutputScale), shifted = gradient(p, kOutputShift);
  const T* dout = static_cast<const T*>(p.dout) + static_cast<int64_t>(blockIdx.x) * size;
  for (int i = threadIdx.x * V; i < size; i += blockDim.x * V) {
    const Pack<T, V> pack = load_pack<T, V>(dout + i);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const int2 at = place_of(s, i + e);
      const float scale = parameter<T>(p.parameters[kOutputScale], at.x, 1);
      const float shift = parameter<T>(p.parameters[kOutputShift], at.x, 0);
      const float value = non_local_value<T>(p, y, z, at);
      const float du = activation_slope(s.activation, scale * value + shift) * to_float(pack.values[e]);
      const int place = at.x * s.stride + at.y;
      z[place] = du * scale;
      if (scaled) rows[place] = du * value;
      if (shifted) rows[s.result * s.stride + place] = du;
    }
  }
}

// w and dscore of a query and a key, four pairs at a time: score -> w, dw -> dscore in natural units.
DNL_DEVICE void score_gradient(float (&w)[4], float (&ds)[4], LayerKernel kernel, const float (&shift)[4],
                               const float (&delta)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (kernel == LayerKernel::dot) continue;  // w is the score, dscore is dw
    w[i] = exp2f(w[i] - shift[i]);
    ds[i] = w[i] * (ds[i] - delta[i]);
  }
}

// sum[d] += ds . (a column's channel d of rows), of the differences to `own` for the Gaussian.
DNL_DEVICE void add_rows4(float (&sum)[kLayerWidth], const LayerSizes& s, const float* rows, int width4, int j,
                          const float (&ds)[4], bool differences, const float (&own)[kLayerWidth]) {
#pragma unroll
  for (int d0 = 0; d0 < kLayerWidth; d0 += 4)
    if (d0 < width4) {
#pragma unroll
      for (int d = d0; d < d0 + 4; d++) {
        float4 b = read4(rows + d * s.stride + j);
        if (differences) b = make_float4(b.x - own[d], b.y - own[d], b.z - own[d], b.w - own[d]);
        sum[d] += (ds[0] * b.x + ds[1] * b.y) + (ds[2] * b.z + ds[3] * b.w);
      }
    }
}

DNL_DEVICE void products4(float (&out)[4], const LayerSizes& s, const float (&a)[kLayerWidth], const float* rows,
                          int width4, int j) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = 0;
#pragma unroll
  for (int e0 = 0; e0 < kLayerWidth; e0 += 4)
    if (e0 < width4) {
#pragma unroll
      for (int e = e0; e < e0 + 4; e++) {
        const float4 b = read4(rows + e * s.stride + j);
        out[0] += a[e] * b.x;
        out[1] += a[e] * b.y;
        out[2] += a[e] * b.z;
        out[3] += a[e] * b.w;
      }
    }
}

// d of a shared projection's weight (rows dq), its bias.
DNL_DEVICE void projection_gradient(const LayerBackward& p, LayerParameter weight, int head, const float* rows,
                                    int width, const float* y) {
  const LayerSizes& s = p.sizes;
  if (float* to = gradient(p, weight)) outer(to + head * width * s.width, s.width, s, rows, width, y, s.width);
  if (float* to = gradient(p, static_cast<LayerParameter>(weight + 1))) row_sums(to + head * width, s, rows, width);
}

// Everything that a head adds. It does not depend on the element type.
DNL_DEVICE void head_gradient(const LayerBackward& p, int head, float* shared, const LayerBackwardLayout& at,
                                   const HeadWeights& w, float factor) {
  const LayerSizes s = p.sizes;
  const bool gaussian = s.kernel == LayerKernel::gaussian;
  float *y = shared + at.y, *dz = shared + at.dz, *dy = shared + at.dy, *q = shared + at.q, *k = shared + at.k;
  float *v = shared + at.v, *dout = shared + at.dout, *t = shared + at.t;
  float *shifts = shared + at.shift, *deltas = shared + at.delta, *drho = shared + at.drho;
  // d score / d (product): the factor in natural units; for the Gaussian the derivative of -|q - k|^2 / (2 h^2).
  const float slope = s.kernel == LayerKernel::dot ? factor : gaussian ? -2.0f * kLn2 * factor : kLn2 * factor;

  if (!gaussian) project_rows(s, q, y, w.query, w.query_bias, s.query4);
  project_rows(s, k, y, w.key, w.key_bias, s.query4);
  project_rows(s, v, y, w.value, w.value_bias, s.value4);
  __syncthreads();
  // The output of the attention, into t; its gradient.
  for (int n = threadIdx.x; n < s.columns; n += blockDim.x) {
    float a[kLayerWidth], o[kLayerWidth] = {}, g[kLayerWidth] = {};
    float shift = 0, delta = 0;
    if (n < s.positions) {
      take(a, q + n, s.stride, s.query4);
      shift = attend(o, s, a, k, v, factor);
      gather(g, dz + n, s.stride, s.result, w.output, s.value4, nullptr);
#pragma unroll
      for (int e = 0; e < kLayerWidth; e++) delta += g[e] * o[e];
    }
    put(t + n, s.stride, s.value4, o);
    put(dout + n, s.stride, s.value4, g);
    shifts[n] = shift;
    deltas[n] = delta;
  }
  __syncthreads();
  if (float* to = gradient(p, kOutputWeight))
    outer(to + head * s.value, s.heads * s.value, s, dz, s.result, t, s.value);
  __syncthreads();
  // Queries: dq into t.
  for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
    float a[kLayerWidth], g[kLayerWidth], dq[kLayerWidth] = {};
    take(a, q + n, s.stride, s.query4);
    take(g, dout + n, s.stride, s.value4);
    const float shift[4] = {shifts[n], shifts[n], shifts[n], shifts[n]};
    const float delta[4] = {deltas[n], deltas[n], deltas[n], deltas[n]};
    float rho = 0;
#pragma unroll 1
    for (int j = 0; j < s.positions; j += 4) {
      float weight[4], ds[4];
      scores4(weight, s, a, k, j, factor);
      const float score[4] = {weight[0], weight[1], weight[2], weight[3]};
      products4(ds, s, g, v, s.value4, j);
      score_gradient(weight, ds, s.kernel, shift, delta);
      add_rows4(dq, s, k, s.query4, j, ds, gaussian, a);
      if (gaussian)  // d score / d rho = -2 score
        for (int i = 0; i < 4; i++) rho -= j + i < s.positions ? 2.0f * kLn2 * ds[i] * score[i] : 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kLayerWidth; d++) dq[d] *= slope;
    put(t + n, s.stride, s.query4, dq);
    if (!gaussian) scatter(dy + n, s.stride, s.width, w.query, s.query4, dq);
    if (gaussian) drho[n] = rho;
  }
  __syncthreads();
  if (!gaussian) projection_gradient(p, kQueryWeight, head, t, s.query, y);
  if (float* to = gradient(p, kRho)) row_sums(to + head, s, drho, 1);
  // Keys and values: a column of k and v is read by its own thread only, so dk and dv take their place; the Gaussian's
  // dk joins dq.
  for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
    float b[kLayerWidth], c[kLayerWidth], dk[kLayerWidth] = {}, dv[kLayerWidth] = {};
    take(b, k + n, s.stride, s.query4);
    take(c, v + n, s.stride, s.value4);
#pragma unroll 1
    for (int j = 0; j < s.positions; j += 4) {
      float weight[4], ds[4];
      scores4(weight, s, b, q, j, factor);
      products4(ds, s, c, dout, s.value4, j);
      const float4 shift = read4(shifts + j), delta = read4(deltas + j);
      score_gradient(weight, ds, s.kernel, {shift.x, shift.y, shift.z, shift.w}, {delta.x, delta.y, delta.z, delta.w});
      add_rows4(dv, s, dout, s.value4, j, weight, false, c);
      add_rows4(dk, s, q, s.query4, j, ds, gaussian, b);
    }
#pragma unroll
    for (int d = 0; d < kLayerWidth; d++) dk[d] *= slope;
    if (gaussian) {
      take(b, t + n, s.stride, s.query4);
#pragma unroll
      for (int d = 0; d < kLayerWidth; d++) dk[d] += b[d];
    }
    put((gaussian ? t : k) + n, s.stride, s.query4, dk);
    put(v + n, s.stride, s.value4, dv);
    scatter(dy + n, s.stride, s.width, w.key, s.query4, dk);
    scatter(dy + n, s.stride, s.width, w.value, s.value4, dv);
  }
  __syncthreads();
  projection_gradient(p, gaussian ? kQueryWeight : kKeyWeight, head, gaussian ? t : k, s.query, y);
  projection_gradient(p, kValueWeight, head, v, s.value, y);
}

// The states' gradients and those of the accumulation's parameters, from dy.
template <class T>
DNL_DEVICE void states_gradient(const LayerBackward& p, const float* dy, float* rows, float* weights) {
  constexpr int kChunk = kLayerBackwardChunk;
  const LayerSizes& s = p.sizes;
  DNL_SHARED(LayerChannel<T>, table, 2 * kChunk);
  LayerChunks<T, kChunk> chunks(table, weights);
  const bool normed = gradient(p, kNormScale) || gradient(p, kNormShift);
  float *shift_rows = rows + kChunk * s.stride, *scale_rows = shift_rows + kChunk * s.stride;
  int state = 0;
  for (int begin = 0; begin < s.channels + s.skip; begin += kChunk) {
    chunks.stage(p, begin);  // its barrier also ends the reading of the rows
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
      float x[kChunk], dx[kChunk];
      chunks.load(x, n);
      gather(dx, dy + n, s.stride, s.width, chunks.filters, kChunk, nullptr);
      int j = state;
#pragma unroll
      for (int u = 0; u < kChunk; u++) {
        const LayerChannel<T>& c = chunks.channels[u];
        float value = x[u];
        if (!c.plain) {
          const float before = c.scale * x[u] + c.shift;
          value = activate(s.input_activation, before);
          dx[u] *= activation_slope(s.input_activation, before);
          if (normed) {
            shift_rows[u * s.stride + n] = dx[u];
            scale_rows[u * s.stride + n] = dx[u] * x[u];
          }
          dx[u] *= c.scale;
        }
        rows[u * s.stride + n] = value;
        if (p.need_states && c.data) {
          while (begin + u >= p.first[j + 1]) j++;
          const int64_t channels = p.first[j + 1] - p.first[j], own = begin + u - p.first[j];
          const int64_t at = s.images ? (blockIdx.x * channels + own) * s.positions + n
                                      : (static_cast<int64_t>(blockIdx.x) * s.positions + n) * channels + own;
          store_global(static_cast<T*>(p.dstates[j]) + at, from_float<T>(dx[u]));
        }
      }
    }
    while (begin + kChunk < s.channels + s.skip && begin + kChunk >= p.first[state + 1]) state++;
    __syncthreads();
    const int own = s.channels - begin < 0 ? 0 : s.channels - begin < kChunk ? s.channels - begin : kChunk;
    const int all = s.channels + s.skip - begin < kChunk ? s.channels + s.skip - begin : kChunk;
    if (float* to = gradient(p, kAffineWeight)) outer(to + begin, s.channels, s, dy, s.width, rows, own, s.tau);
    if (float* to = gradient(p, kSkipWeight))
      outer(to + begin + own - s.channels, s.skip, s, dy, s.width, rows + own * s.stride, all - own);
    if (float* to = gradient(p, kNormScale)) row_sums(to + begin, s, scale_rows, own);
    if (float* to = gradient(p, kNormShift)) row_sums(to + begin, s, shift_rows, own);
  }
}

template <class T>
__global__ void __launch_bounds__(kLayerThreads) dnl_layer_bwd_kernel(const __grid_constant__ LayerBackward p) {
  DNL_DYNAMIC_SHARED(float, shared);
  const LayerSizes& s = p.sizes;
  const LayerBackwardLayout at(s, p.parameters[kNormScale] || p.parameters[kNormShift],
                               p.parameters[kOutputScale] || p.parameters[kOutputShift]);
  float *y = shared + at.y, *dz = shared + at.dz, *dy = shared + at.dy, *rows = shared + at.q;
  float* weights = shared + at.weights;
  accumulate_states<T>(p, y, weights);
  non_local<T>(p, y, dz, shared + at.k, shared + at.v, weights);
  if (p.wide_dout)
    output_gradient<T, 16 / sizeof(T)>(p, y, dz, rows);
  else
    output_gradient<T, 1>(p, y, dz, rows);
  __syncthreads();
  if (float* to = gradient(p, kOutputScale)) row_sums(to, s, rows, s.result);
  if (float* to = gradient(p, kOutputShift)) row_sums(to, s, rows + s.result * s.stride, s.result);
  if (float* to = gradient(p, kOutputBias)) row_sums(to, s, dz, s.result);
  for (int g = 0; g < s.width; g++)
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x)
      dy[g * s.stride + n] = s.residual ? dz[g * s.stride + n] : 0.0f;
  for (int head = 0; head < s.heads; head++) {
    __syncthreads();
    const HeadWeights w = stage_head<T>(p, head, weights);
    __syncthreads();
    head_gradient(p, head, shared, at, w, score_factor<T>(s, p.parameters[kRho], head));
  }
  __syncthreads();
  if (float* to = gradient(p, kAffineBias)) row_sums(to, s, dy, s.width);
  if (float* to = gradient(p, kSkipBias)) row_sums(to, s, dy, s.width);
  states_gradient<T>(p, dy, rows, weights);
}

// out[i] = sum over the samples, in their order, of partial[sample, i].
template <class T>
__global__ void __launch_bounds__(kLayerThreads) sum_samples_kernel(const float* partial, T* out, int64_t samples,
                                                                    int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t b = 0; b < samples; b++) sum += load_global(partial + b * size + i);
  store_global(out + i, from_float<T>(sum));
}

}  // namespace dnl
