// dnl_layer on a GPU, backward: a block of threads makes every gradient of one sample; nothing but the inputs was kept.
//
// The forward pass runs again, up to N(y); then each head again with its gradients. The gradients of the parameters are
// sums over positions, written for each sample, and added over the samples in their order by a second kernel.
#pragma once
#include "dnl_layer/kernel.cuh"

namespace dnl {

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

template <class T>
__global__ void __launch_bounds__(kLayerThreads) dnl_layer_bwd_kernel(const __grid_constant__ LayerBackward p) {
  DNL_DYNAMIC_SHARED(float, shared);
  using Arithmetic = LayerArithmetic<T>;
  const LayerSizes& s = p.sizes;
  const LayerBackwardLayout at(s, p.parameters[kNormScale] || p.parameters[kNormShift],
                               p.parameters[kOutputScale] || p.parameters[kOutputShift]);
  float *y = shared + at.y, *dz = shared + at.dz, *dy = shared + at.dy, *rows = shared + at.q;
  float* weights = shared + at.weights;
  Arithmetic::accumulate(p, y, shared + at.k, weights);
  non_local<T>(p, y, dz, shared + at.k, shared + at.v, shared + at.bias, weights);
  if (p.wide_dout)
    output_gradient<T, 16 / sizeof(T)>(p, y, dz, rows);
  else
    output_gradient<T, 1>(p, y, dz, rows);
  __syncthreads();
  if (float* to = gradient(p, kOutputScale)) row_sums(to, s, rows, s.result);
  if (float* to = gradient(p, kOutputShift)) row_sums(to, s, rows + s.result * s.stride, s.result);
  if (float* to = gradient(p, kOutputBias)) row_sums(to, s, dz, s.result);
  for (int g = 0; g < s.width; g++)
    for (int n = threadIdx.x; n < s.columns; n += blockDim.x)
      dy[g * s.stride + n] = s.residual ? dz[g * s.stride + n] : 0.0f;
  for (int head = 0; head < s.heads; head++) {
    __syncthreads();
    const auto w = Arithmetic::stage_head(p, head, weights);
    __syncthreads();
    Arithmetic::head_gradient(p, head, shared, at, w, score_factor<T>(s, p.parameters[kRho], head));
  }
  __syncthreads();
  if (float* to = gradient(p, kAffineBias)) row_sums(to, s, dy, s.width);
  if (float* to = gradient(p, kSkipBias)) row_sums(to, s, dy, s.width);
  Arithmetic::states_gradient(p, dy, rows, weights);
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
