// dnl_layer on a GPU, forward: a block of threads makes one sample, from the states to the result, in shared memory.
// float32 is multiplied by FFMA (columns.cuh), half types on tensor cores (tensor_cores.cuh).
#pragma once
#include "dnl_layer/columns.cuh"
#include "dnl_layer/tensor_cores_backward.cuh"

namespace dnl {

template <class T>
using LayerArithmetic = std::conditional_t<sizeof(T) == 2, LayerTensorCoresBackward<T>, LayerColumns>;

template <class T, class Params>
DNL_DEVICE void non_local(const Params& p, const float* y, float* z, float* k, float* v, float* bias, float* weights) {
  using Arithmetic = LayerArithmetic<T>;
  const LayerSizes& s = p.sizes;
  for (int r = 0; r < s.result; r++)
    for (int n = threadIdx.x; n < s.columns; n += blockDim.x) z[r * s.stride + n] = 0;
  __syncthreads();  // the filters of the accumulation are read no more
  for (int head = 0; head < s.heads; head++) {
    const auto w = Arithmetic::stage_head(p, head, weights);
    __syncthreads();
    Arithmetic::attend_head(s, w, y, z, k, v, bias, score_factor<T>(s, p.parameters[kRho], head));
  }
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
  LayerArithmetic<T>::accumulate(p, y, shared + at.k, weights);
  non_local<T>(p, y, z, shared + at.k, shared + at.v, shared + at.bias, weights);
  if (p.wide_out)
    write_result<T, 16 / sizeof(T)>(p, y, z);
  else
    write_result<T, 1>(p, y, z);
}

}  // namespace dnl
