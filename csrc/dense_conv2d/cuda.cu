// dense_conv2d on CUDA: checks -> tiles -> params -> launch. Meaning: dnl_kernels/ops/dense_conv2d/reference.py.
#include <algorithm>

#include "common/launch.cuh"
#include "common/conv_host.h"
#include "dense_conv2d/backward.cuh"

namespace dnl {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The tensor where the rows of each plane are dense, as they are in a slice of channels; else a copy.
Tensor with_dense_rows(const Tensor& t) {
  const int64_t h = t.size(2), w = t.size(3);
  return (w <= 1 || t.stride(3) == 1) && (h <= 1 || t.stride(2) == w) ? t : contiguous(t);
}

// The largest tiles for which fits(tiling) holds, but enough of them for a whole GPU where images are small.
template <class Fits>
ConvTiling choose_tiling(int64_t batch, int64_t height, int64_t width, int radius, Fits fits) {
  constexpr int64_t kEnoughTiles = 128, kFewPositions = 256;
  const auto tiling = [&](int64_t images, int64_t rows) {
    return ConvTiling::of(batch, height, width, radius, images, rows);
  };
  if (height * width < kConvMaxPositions && fits(tiling(1, height))) {
    const int64_t few = ceil_div(kFewPositions, tiling(1, height).image_pitch);
    int64_t images = std::min(batch, std::max(few, batch / kEnoughTiles));
    while (images > 1 && !fits(tiling(images, height))) images--;
    return tiling(ceil_div(batch, ceil_div(batch, images)), height);
  }
  int64_t rows = std::min<int64_t>(height, kConvMaxPositions);
  while (rows > 1 && !fits(tiling(1, rows))) rows--;
  const ConvTiling t = tiling(1, ceil_div(height, ceil_div(height, rows)));
  DNL_CHECK(fits(t), "dense_conv2d: a row of the images does not fit in shared memory");
  return t;
}

struct Prepared {
  std::vector<Tensor> kept;  // what the pointers in the parameters refer to
  int64_t batch, height, width;
  int radius;
};

const void* keep(Prepared& r, const std::optional<Tensor>& t, const Tensor& like, int64_t length, const char* name) {
  if (!t.has_value()) return nullptr;
  DNL_CHECK(t->numel() == length && t->scalar_type() == like.scalar_type() && t->device() == like.device(),
            "dense_conv2d: ", name, " does not fit the weight");
  r.kept.push_back(contiguous(*t));
  return r.kept.back().data_ptr();
}

Prepared prepare(const std::vector<Tensor>& states, const Tensor& weight, const std::optional<Tensor>& norm_scale,
                 const std::optional<Tensor>& norm_shift, const std::string& activation, double scale, ConvCommon& p) {
  DNL_CHECK(!states.empty() && states[0].dim() == 4 && weight.dim() == 4, "dense_conv2d: states or weight");
  const Tensor& first = states[0];
  Prepared r{{}, first.size(0), first.size(2), first.size(3), static_cast<int>(weight.size(2) / 2)};
  DNL_CHECK(weight.size(2) == weight.size(3) && (weight.size(2) == 1 || weight.size(2) == 3),
            "dense_conv2d: CUDA takes filters of 1x1 and 3x3");
  DNL_CHECK(r.width <= kConvMaxWidth && weight.size(0) <= kConvMaxOutputs,
            "dense_conv2d: CUDA takes images up to ", kConvMaxWidth, " pixels wide and up to ", kConvMaxOutputs,
            " outputs");
  const int64_t pixels = 16 / weight.element_size();
  p.vectors = r.width % pixels == 0;
  p.count = 0;
  int64_t channels = 0;
  for (const Tensor& state : states) {
    DNL_CHECK(state.dim() == 4 && state.size(0) == r.batch && state.size(2) == r.height && state.size(3) == r.width &&
                  state.scalar_type() == weight.scalar_type() && state.device() == weight.device(),
              "dense_conv2d: states differ");
    const int64_t size = state.size(1);
    if (size == 0) continue;
    DNL_CHECK(p.count < kConvMaxStates, "dense_conv2d: CUDA takes at most ", kConvMaxStates, " states");
    const Tensor x = with_dense_rows(state);
    r.kept.push_back(x);
    p.states[p.count++] = {x.data_ptr(), x.stride(0), x.stride(1), static_cast<int>(channels), static_cast<int>(size)};
    p.vectors = p.vectors && aligned(x.data_ptr()) && (r.batch == 1 || x.stride(0) % pixels == 0) &&
                (size == 1 || x.stride(1) % pixels == 0);
    channels += size;
  }
  DNL_CHECK(weight.size(1) == channels, "dense_conv2d: weight has the wrong number of input channels");
  p.channels = static_cast<int>(channels);
  p.outputs = static_cast<int>(weight.size(0));
  p.taps = static_cast<int>(weight.size(2) * weight.size(3));
  p.activation = activation_of(activation);
  p.scale = static_cast<float>(scale);
  p.weight = keep(r, weight, weight, weight.numel(), "weight");
  p.norm_scale = keep(r, norm_scale, weight, channels, "norm_scale");
  p.norm_shift = keep(r, norm_shift, weight, channels, "norm_shift");
  return r;
}

int threads_of(int blocks, int blocks_per_warp) {
  return 32 * static_cast<int>(std::clamp<int64_t>(ceil_div(blocks, blocks_per_warp), 4, kConvMaxWarps));
}

// Runs body(a constant): whether float32 is multiplied as tf32.
template <class T, class Body>
void with_tf32(bool tf32, Body body) {
  DNL_CHECK(!tf32 || sizeof(T) == 4, "dense_conv2d: tf32 is a way to multiply float32");
  if constexpr (sizeof(T) == 4)
    if (tf32) return body(std::true_type{});
  body(std::false_type{});
}

std::tuple<Tensor, Tensor> forward(const std::vector<Tensor>& states, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& norm_scale,
                                   const std::optional<Tensor>& norm_shift, const std::string& activation,
                                   double scale, bool want_moments, bool tf32 = false) {
  ConvForward p;
  Prepared r = prepare(states, weight, norm_scale, norm_shift, activation, scale, p);
  p.bias = keep(r, bias, weight, p.outputs, "bias");
  Tensor y = new_empty(weight, {r.batch, p.outputs, r.height, r.width});
  Tensor moments = torch::stable::new_zeros(weight, {2, want_moments ? p.outputs : 0}, ScalarType::Float);
  if (y.numel() == 0) return {y, moments};
  const int octets = p.outputs <= 8 ? 1 : p.outputs <= 16 ? 2 : 4;
  const int64_t element = weight.element_size(), chunk = element == 2 ? 16 : 8;
  const int64_t filters = element == 2 ? 8 * octets * (p.taps * 16 + 8) : 8 * octets * p.taps * chunk;
  const auto shared = [&](const ConvTiling& t) { return static_cast<size_t>(chunk * t.length + filters) * element; };
  p.tiling = choose_tiling(r.batch, r.height, r.width, r.radius, [&](const ConvTiling& t) {
    return 16 * t.blocks() <= kConvMaxPositions && shared(t) <= kConvSharedBytes;
  });
  p.y = y.data_ptr();
  p.store_vectors = r.width % (16 / element) == 0 && aligned(p.y);
  const int64_t tiles = p.tiling.tiles();
  Tensor partial = new_empty(weight, {want_moments ? tiles : 0, p.outputs, 2}, ScalarType::Float);
  p.moments = want_moments ? static_cast<float*>(partial.data_ptr()) : nullptr;
  Launcher launch(y);
  dispatch_device("dense_conv2d", weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_tf32<T>(tf32, [&](auto use_tf32) {
      constexpr bool kTf32 = decltype(use_tf32)::value;
      const auto kernel = octets == 1   ? dense_conv2d_fwd_kernel<T, 1, kTf32>
                          : octets == 2 ? dense_conv2d_fwd_kernel<T, 2, kTf32>
                                        : dense_conv2d_fwd_kernel<T, 4, kTf32>;
      launch("dense_conv2d_fwd", kernel, dim3(tiles), threads_of(p.tiling.blocks(), kConvBlocksPerWarp),
             shared(p.tiling), p);
    });
  });
  if (want_moments) {
    ConvReduce reduce{};
    reduce.partial = {p.moments, 2 * p.outputs, 0, 2 * p.outputs};
    reduce.rows = tiles;
    reduce.norm_shift = moments.data_ptr();
    reduce.norm_scale = static_cast<float*>(moments.data_ptr()) + p.outputs;
    launch("dense_conv2d_reduce", dense_conv2d_reduce_kernel<float>, dim3(ceil_div(reduce.partial.row, 32)), 256, 0,
           reduce);
  }
  return {y, moments};
}

Tensor dense_conv2d_fwd(const std::vector<Tensor>& states, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift,
                        const std::string& activation, double scale) {
  return std::get<0>(forward(states, weight, bias, norm_scale, norm_shift, activation, scale, false));
}

Tensor dense_conv2d_tf32_fwd(const std::vector<Tensor>& states, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift,
                             const std::string& activation, double scale) {
  return std::get<0>(forward(states, weight, bias, norm_scale, norm_shift, activation, scale, false, true));
}

std::tuple<Tensor, Tensor> dense_conv2d_moments_fwd(const std::vector<Tensor>& states, const Tensor& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& norm_scale,
                                                    const std::optional<Tensor>& norm_shift,
                                                    const std::string& activation, double scale) {
  return forward(states, weight, bias, norm_scale, norm_shift, activation, scale, true);
}

using Gradients = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dy_in, const std::vector<Tensor>& states, const Tensor& weight,
                   const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift,
                   const std::string& activation, double scale, bool need_states, bool need_weight, bool need_bias,
                   bool need_norm, bool tf32) {
  ConvBackward p;
  Prepared r = prepare(states, weight, norm_scale, norm_shift, activation, scale, p);
  DNL_CHECK(dy_in.dim() == 4 && dy_in.size(0) == r.batch && dy_in.size(1) == p.outputs && dy_in.size(2) == r.height &&
                dy_in.size(3) == r.width && dy_in.scalar_type() == weight.scalar_type() &&
                dy_in.device() == weight.device(),
            "dense_conv2d: dy does not fit the output");
  const Tensor dy = contiguous(dy_in);
  const bool empty = dy.numel() == 0;
  const auto result = [&](bool wanted, std::vector<int64_t> sizes) {
    if (!wanted) sizes[0] = 0;
    return empty ? torch::stable::new_zeros(weight, {sizes.data(), sizes.size()})
                 : new_empty(weight, {sizes.data(), sizes.size()});
  };
  std::vector<Tensor> dstates;
  int count = 0;
  for (size_t j = 0; need_states && j < states.size(); j++) {
    dstates.push_back(result(true, {r.batch, states[j].size(1), r.height, r.width}));
    if (states[j].size(1)) p.dstates[count++] = dstates[j].data_ptr();
  }
  Tensor dweight = result(need_weight, {p.outputs, p.channels, weight.size(2), weight.size(3)});
  Tensor dbias = result(need_bias, {p.outputs});
  Tensor dscale = result(need_norm && norm_scale.has_value(), {p.channels});
  Tensor dshift = result(need_norm && norm_shift.has_value(), {p.channels});
  if (empty) return {dstates, dweight, dbias, dscale, dshift};
  p.dy = dy.data_ptr();
  p.dy_vectors = r.width % (16 / weight.element_size()) == 0 && aligned(p.dy);
  p.need_states = need_states;
  p.need_weight = need_weight;
  p.need_norm = need_norm && (norm_scale.has_value() || norm_shift.has_value());
  Launcher launch(dy);
  dispatch_device("dense_conv2d", weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_tf32<T>(tf32, [&](auto use_tf32) {
      constexpr bool kTf32 = decltype(use_tf32)::value;
      const auto layout = [&](const ConvTiling& t) { return ConvBackwardShared<T, kTf32>(t.length, p.outputs, p.taps); };
      p.tiling = choose_tiling(r.batch, r.height, r.width, r.radius, [&](const ConvTiling& t) {
        return 16 * t.blocks() <= kConvMaxPositions && layout(t).total * sizeof(T) <= kConvSharedBytes;
      });
      const auto shared = layout(p.tiling);
      const int64_t blocks = std::min<int64_t>(p.tiling.tiles(), kConvPartialRows);
      p.partial.weights = weight.numel();
      p.partial.moments = 2 * p.channels;
      p.partial.row = ceil_div(p.partial.weights + p.partial.moments + p.outputs, 32) * 32;  // whole sectors
      Tensor partial = new_empty(weight, {blocks, p.partial.row}, ScalarType::Float);
      p.partial.data = static_cast<float*>(partial.data_ptr());
      int threads = threads_of(p.tiling.blocks(), kConvBlocksPerWarp);
      if (shared.kTensorCores && shared.in_place())  // half of the warps put their fragments where the activations were
        while (threads / 64 * shared.slot(p.taps) * 4 > 32 * p.tiling.length) threads -= 32;
      launch("dense_conv2d_bwd", dense_conv2d_bwd_kernel<T, kTf32>, dim3(blocks), threads, shared.total * sizeof(T), p);
      const auto data = [](Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; };
      const ConvReduce reduce{p.partial, blocks,    data(dweight), data(dbias), data(dscale), data(dshift),
                              p.outputs, p.scale};
      if (need_weight || need_bias || p.need_norm)
        launch("dense_conv2d_reduce", dense_conv2d_reduce_kernel<T>, dim3(ceil_div(p.partial.row, 32)), 256, 0, reduce);
    });
  });
  return {dstates, dweight, dbias, dscale, dshift};
}

Gradients dense_conv2d_bwd(const Tensor& dy, const std::vector<Tensor>& states, const Tensor& weight,
                           const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift,
                           const std::string& activation, double scale, bool need_states, bool need_weight,
                           bool need_bias, bool need_norm) {
  return backward(dy, states, weight, norm_scale, norm_shift, activation, scale, need_states, need_weight, need_bias,
                  need_norm, false);
}

Gradients dense_conv2d_tf32_bwd(const Tensor& dy, const std::vector<Tensor>& states, const Tensor& weight,
                                const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift,
                                const std::string& activation, double scale, bool need_states, bool need_weight,
                                bool need_bias, bool need_norm) {
  return backward(dy, states, weight, norm_scale, norm_shift, activation, scale, need_states, need_weight, need_bias,
                  need_norm, true);
}

}  // namespace
}  // namespace dnl

DNL_CUDA_LIBRARY(m) {
  m.impl("dense_conv2d_fwd", TORCH_BOX(&dnl::dense_conv2d_fwd));
  m.impl("dense_conv2d_moments_fwd", TORCH_BOX(&dnl::dense_conv2d_moments_fwd));
  m.impl("dense_conv2d_bwd", TORCH_BOX(&dnl::dense_conv2d_bwd));
  m.impl("dense_conv2d_tf32_fwd", TORCH_BOX(&dnl::dense_conv2d_tf32_fwd));
  m.impl("dense_conv2d_tf32_bwd", TORCH_BOX(&dnl::dense_conv2d_tf32_bwd));
}
