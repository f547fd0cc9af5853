// dnl_block on CUDA, resident: checks -> params -> launch. Meaning: dnl_kernels/ops/dnl_block/reference.py.
#include <algorithm>

#include "common/conv_host.h"
#include "common/launch.cuh"
#include "dnl_block/kernel.cuh"

namespace dnl {
namespace {

using torch::stable::contiguous;
using Optional = std::optional<Tensor>;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls body(kernel, bytes of shared memory as a function of a tiling) of the instance for so many outputs.
template <class T, class Body>
void with_kernel(int channels, int growth, int taps, Body body) {
  const auto use = [&](auto octets) {
    constexpr int kOctets = decltype(octets)::value;
    body(dnl_block_fwd_kernel<T, kOctets>, [=](const ConvTiling& t) {
      return BlockLayout<T, kOctets>(t, channels, taps).total * sizeof(T);
    });
  };
  if (growth <= 8) return use(std::integral_constant<int, 1>{});
  if (growth <= 16) return use(std::integral_constant<int, 2>{});
  use(std::integral_constant<int, 4>{});
}

Tensor dnl_block_resident(const Tensor& x0_in, const Tensor& weight_in, const Optional& bias, const Optional& gamma,
                          const Optional& beta, const Optional& mean, const Optional& var,
                          const std::vector<int64_t>& connectivity, int64_t growth_rate, int64_t size,
                          bool preactivation, bool norm, bool training, std::string activation, double tau,
                          double eps) {
  DNL_CHECK(x0_in.dim() == 4 && (size == 1 || size == 3), "dnl_block: CUDA takes images, filters of 1x1 and 3x3");
  DNL_CHECK(!(norm && training), "dnl_block: CUDA has no statistics of a batch");
  const int64_t batch = x0_in.size(0), height = x0_in.size(2), width = x0_in.size(3);
  const bool dense = (width <= 1 || x0_in.stride(3) == 1) && (height <= 1 || x0_in.stride(2) == width);
  const Tensor x0 = dense ? x0_in : contiguous(x0_in), weight = contiguous(weight_in);
  BlockForward p{};
  p.in_channels = static_cast<int>(x0.size(1));
  p.growth = static_cast<int>(growth_rate);
  p.taps = static_cast<int>(size * size);
  DNL_CHECK(growth_rate >= 1 && growth_rate <= kBlockMaxOutputs, "dnl_block: CUDA takes growth rates up to ",
            kBlockMaxOutputs);
  int64_t read = 0;
  size_t i = 0;
  for (; i < connectivity.size(); p.layers++) {
    DNL_CHECK(p.layers < kBlockMaxLayers, "dnl_block: CUDA takes at most ", kBlockMaxLayers, " layers");
    p.offsets[p.layers] = static_cast<int>(read);
    for (int j = 0; j <= p.layers && i < connectivity.size(); j++, i++)
      if (connectivity[i]) {
        p.reads[p.layers] |= uint64_t(1) << j;
        read += j ? growth_rate : p.in_channels;
      }
    p.widths[p.layers] = static_cast<int>(read) - p.offsets[p.layers];
  }
  const int64_t norms = preactivation ? read : p.layers * growth_rate;
  DNL_CHECK(weight.numel() == read * growth_rate * p.taps && weight.scalar_type() == x0.scalar_type() &&
                weight.device() == x0.device(),
            "dnl_block: the weight does not fit the block");
  std::vector<Tensor> kept;
  const auto data = [&](const Optional& t, int64_t numel, bool needed) -> const float* {
    DNL_CHECK(t || !needed, "dnl_block: statistics are missing");
    if (!t) return nullptr;
    DNL_CHECK(t->numel() == numel && t->scalar_type() == ScalarType::Float && t->device() == x0.device(),
              "dnl_block: a vector does not fit the block");
    kept.push_back(contiguous(*t));
    return static_cast<const float*>(kept.back().data_ptr());
  };
  p.bias = data(bias, p.layers * growth_rate, false);
  p.norm = norm;
  p.gamma = data(gamma, norms, false);
  p.beta = data(beta, norms, false);
  p.mean = data(mean, norms, norm);
  p.var = data(var, norms, norm);
  Tensor states = torch::stable::new_empty(x0, {batch, p.channels(), height, width});
  if (states.numel() == 0) return states;
  const int64_t element = x0.element_size(), pack = 16 / element;
  p.x0 = x0.data_ptr();
  p.weight = weight.data_ptr();
  p.states = states.data_ptr();
  p.image_step = x0.stride(0);
  p.channel_step = x0.stride(1);
  p.activation = activation_of(activation);
  p.tau = static_cast<float>(tau);
  p.eps = static_cast<float>(eps);
  p.preactivation = preactivation;
  p.vectors = width % pack == 0 && aligned(p.states);
  p.x0_vectors = width % pack == 0 && aligned(p.x0) && (batch == 1 || p.image_step % pack == 0) &&
                 (p.in_channels == 1 || p.channel_step % pack == 0);
  Launcher launch(states);
  dispatch_device("dnl_block", x0.scalar_type(), [&](auto zero) {
    with_kernel<decltype(zero)>(p.channels(), p.growth, p.taps, [&](auto kernel, auto shared) {
      // Several small images share the filters, once there are enough blocks of threads for a whole GPU.
      constexpr int64_t kEnoughTiles = 128, kSharedBytes = 94 << 10;
      int64_t images = std::clamp<int64_t>(batch / kEnoughTiles, 1, batch);
      const auto tiling = [&] { return ConvTiling::of(batch, height, width, size / 2, images, height); };
      while (images > 1 && (shared(tiling()) > kSharedBytes || 16 * tiling().blocks() > kConvMaxPositions)) images--;
      p.tiling = tiling();
      DNL_CHECK(16 * p.tiling.blocks() <= kConvMaxPositions, "dnl_block: an image has too many positions");
      const int threads = 32 * std::clamp((p.tiling.blocks() + 1) / 2, 4, kConvMaxWarps);
      launch("dnl_block_fwd", kernel, dim3(p.tiling.tiles()), threads, shared(p.tiling), p);
    });
  });
  return states;
}

}  // namespace
}  // namespace dnl

DNL_CUDA_LIBRARY(m) { m.impl("dnl_block_resident", TORCH_BOX(&dnl::dnl_block_resident)); }
