// dense_conv2d on the CPU: checks -> tiles -> the loops of common/conv.h. Meaning: ops/dense_conv2d/reference.py.
#include <algorithm>

#include "common/conv_host.h"
#include "common/winograd_host.h"

namespace dnl {
namespace {

struct Problem {
  std::vector<Tensor> states;
  Tensor weight;
  std::optional<Tensor> norm_scale, norm_shift;
  Activation activation;
  double scale;
  int64_t batch, height, width, channels, outputs, size, taps;
  // Filters of one pixel need no padding: planes of whole vectors are read and written where they lie, in rows of
  // kPlaneAlign pixels, image by image.
  bool in_place;
  Tiling tiling;
};

bool fits_in_place(int64_t size, int64_t pixels) {
  return size == 1 && pixels % kPlaneAlign == 0 && pixels >= kFewPositions;
}

Tiling tiling_of(int64_t batch, int64_t height, int64_t width, int64_t size) {
  if (!fits_in_place(size, height * width)) return Tiling(batch, height, width, size / 2);
  Tiling tiling(batch, height * width / kPlaneAlign, kPlaneAlign, 0);
  tiling.images = 1;
  return tiling;
}

std::optional<Tensor> prepared(const std::optional<Tensor>& t, int64_t length, const char* name) {
  if (!t.has_value()) return std::nullopt;
  DNL_CHECK(t->numel() == length, "dense_conv2d: ", name, " has the wrong number of elements");
  return widened(*t);
}

Problem prepare(const std::vector<Tensor>& states, const Tensor& weight, const std::optional<Tensor>& norm_scale,
                const std::optional<Tensor>& norm_shift, const std::string& activation, double scale) {
  DNL_CHECK(!states.empty() && states[0].dim() == 4 && weight.dim() == 4, "dense_conv2d: states or weight");
  const Tensor& first = states[0];
  const int64_t batch = first.size(0), height = first.size(2), width = first.size(3), size = weight.size(2);
  DNL_CHECK(size % 2 == 1 && weight.size(3) == size, "dense_conv2d: the filter is not square and odd");
  std::vector<Tensor> dense;
  int64_t channels = 0;
  for (const Tensor& x : states) {
    DNL_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(2) == height && x.size(3) == width &&
                  x.scalar_type() == weight.scalar_type(),
              "dense_conv2d: states differ");
    channels += x.size(1);
    dense.push_back(with_dense_planes(x));
  }
  DNL_CHECK(weight.size(1) == channels, "dense_conv2d: weight has the wrong number of input channels");
  return {std::move(dense),
          widened(weight),
          prepared(norm_scale, channels, "norm_scale"),
          prepared(norm_shift, channels, "norm_shift"),
          activation_of(activation),
          scale,
          batch,
          height,
          width,
          channels,
          weight.size(0),
          size,
          size * size,
          fits_in_place(size, height * width),
          tiling_of(batch, height, width, size)};
}

template <class T>
const T* from_channel(const std::optional<Tensor>& t, int64_t channel) {
  const T* data = data_or_null<T>(t);
  return data ? data + channel : nullptr;
}

template <class T>
Stack<T> in_place(const Tile& tile, Planes<T> planes) {
  return {planes.data + tile.row * tile.flat.width, planes.channel_stride};
}

// act(scale_c * x + shift_c) for some channels of a tile: where they lie, or else in `copy`.
template <class T>
Stack<const T> read(const Problem& p, const Tile& tile, Planes<const T> x, int64_t channels, const T* scale,
                    const T* shift, Activation activation, T* copy) {
  const FlatPlane& f = tile.flat;
  if (p.in_place && activation.kind == ActivationKind::identity && !scale && !shift) return in_place(tile, x);
  if (p.in_place)
    activate_tile<T>(f, in_place(tile, x), channels, scale, shift, nullptr, activation, copy, nullptr);
  else
    DNL_ISA_CALL(load_planes<T>(tile, x, channels, scale, shift, activation, copy));
  return {copy, f.length()};
}

bool wide(const Problem& p) { return is_wide(p.size, p.channels, p.outputs); }

template <class T>
std::vector<WideInput<T>> wide_inputs(const Problem& p) {
  std::vector<WideInput<T>> inputs;
  int64_t channel = 0;
  for (const Tensor& state : p.states) {
    inputs.push_back({planes_of<const T>(state), state.size(1), from_channel<T>(p.norm_scale, channel),
                      from_channel<T>(p.norm_shift, channel), p.activation});
    channel += state.size(1);
  }
  return inputs;
}

// One row of an image.
template <class T>
T* row_of(Planes<T> planes, int64_t image, int64_t channel, int64_t pixel) {
  return at(planes, image, channel).data + pixel;
}

template <class T>
void forward_wide(const Problem& p, const T* bias, Planes<T> y) {
  const TileGrid grid{p.batch, p.height, p.width};
  const std::vector<T> filters =
      wide_filters(static_cast<const T*>(p.weight.data_ptr()), p.outputs, p.channels, p.scale);
  convolve_wide(grid, wide_inputs<T>(p), filters.data(), p.outputs,
                [&](int64_t, int64_t o, int64_t image, int64_t row, int64_t x, int64_t n, const T* sums) {
                  DNL_ISA_CALL(activate_run<T>(sums, n, T(1), bias ? bias[o] : T(0), static_cast<const T*>(nullptr),
                                               kIdentity, row_of(y, image, o, row * p.width + x),
                                               static_cast<T*>(nullptr)));
                });
}

template <class T>
void forward(const Problem& p, const T* bias, Planes<T> y) {
  if (wide(p)) return forward_wide(p, bias, y);
  std::vector<T> packed(p.outputs * p.channels * p.taps);
  pack_filters(elements_of<const T>(p.weight), p.outputs, p.channels, p.taps, T(p.scale), packed.data());
  const int64_t length = p.tiling.largest().length(), block = conv_block(p.taps);
  const int64_t bytes = Scratch::bytes<int64_t>(p.taps) + Scratch::bytes<T>((block + p.outputs) * length);
  parallel_tasks(0, p.tiling.count(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    int64_t* taps = scratch.take<int64_t>(p.taps);
    T* const planes = scratch.take<T>((block + p.outputs) * length);
    for (int64_t i = begin; i < end; i++) {
      const Tile tile = p.tiling.tile(i);
      const FlatPlane& f = tile.flat;
      tap_offsets(f, false, taps);
      T* copy = planes + f.origin();
      const Planes<T> to = at(y, tile.image, 0);
      const Stack<T> out = p.in_place ? in_place(tile, to) : Stack<T>{copy + block * f.length(), f.length()};
      int64_t channel = 0;
      const auto add = [&](Stack<const T> in, int64_t n) {
        for_each_group(p.outputs, [&](int64_t o, int64_t outputs) {
          const T* w = packed.data() + (o * p.channels + channel * outputs) * p.taps;
          DNL_ISA_CALL(convolve<T>(f, in, n, taps, p.taps, w, outputs, bias && channel == 0 ? bias + o : nullptr,
                                   channel > 0, out.plane(o), Ahead{}));
        });
        channel += n;
      };
      for (const Tensor& state : p.states)
        for (int64_t c = 0; c < state.size(1); c += block) {
          const int64_t n = std::min(block, state.size(1) - c);
          add(read<T>(p, tile, at(planes_of<const T>(state), tile.image, c), n, from_channel<T>(p.norm_scale, channel),
                      from_channel<T>(p.norm_shift, channel), p.activation, copy),
              n);
        }
      if (channel == 0) add({copy, f.length()}, 0);  // nothing but the bias
      if (!p.in_place) DNL_ISA_CALL(store_planes<T>(tile, out.read(), p.outputs, to));
    }
  });
}

// What a backward pass is asked for; null pointers where it is not.
template <class T>
struct Gradients {
  std::vector<Planes<T>> states;
  T *weight, *bias, *norm_scale, *norm_shift;
  bool accumulate = false;  // the states' gradients are added to what is there
};

// Sums over all pixels of every output's gradient.
template <class T>
void sum_outputs(const Problem& p, Planes<const T> dy, T* sums) {
  parallel_tasks(0, p.outputs, 1, [&](int64_t o, int64_t) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; b++) {
      double mean = 0, deviations = 0;
      const int64_t pixels = p.height * p.width;
      DNL_ISA_CALL(moments<T>(at(dy, b, o).data, pixels, &mean, &deviations));
      sum += pixels ? mean * pixels : 0;
    }
    sums[o] = static_cast<T>(sum);
  });
}

template <class T>
void backward_wide(const Problem& p, Planes<const T> dy, const Gradients<T>& g) {
  const TileGrid grid{p.batch, p.height, p.width};
  const T* const weight = static_cast<const T*>(p.weight.data_ptr());
  const bool sums_norm = g.norm_scale || g.norm_shift;
  const std::vector<WideInput<T>> inputs = wide_inputs<T>(p);
  if (g.weight) weight_gradient_wide(grid, inputs, dy, p.outputs, p.scale, g.weight);
  if (g.bias) sum_outputs(p, dy, g.bias);
  const int64_t runs = runs_of(grid);
  for (int64_t s = 0, first = 0; (!g.states.empty() || sums_norm) && s < int64_t(inputs.size());
       first += inputs[s++].channels) {
    const WideInput<T>& in = inputs[s];
    const std::vector<T> filters = wide_filters_back(weight, p.outputs, p.channels, first, in.channels, p.scale);
    std::vector<double> sums(sums_norm ? runs * in.channels * 2 : 0);  // of v and v * x, for every run
    const auto finish = [&](int64_t run, int64_t c, int64_t image, int64_t row, int64_t x, int64_t n, const T* v) {
      const int64_t pixel = row * p.width + x;
      T unwanted[2 * kRun];
      double unused[2] = {};
      DNL_ISA_CALL(activate_back_run<T>(v, row_of(in.planes, image, c, pixel), n, in.scale ? in.scale[c] : T(1),
                                        in.shift ? in.shift[c] : T(0), T(0), in.activation, g.accumulate,
                                        g.states.empty() ? unwanted : row_of(g.states[s], image, c, pixel),
                                        sums_norm ? &sums[(run * in.channels + c) * 2] : unused));
    };
    convolve_wide(grid, {{dy, p.outputs, nullptr, nullptr, kIdentity}}, filters.data(), in.channels, finish);
    for (int64_t c = 0; sums_norm && c < in.channels; c++) {
      double plain = 0, moment = 0;
      for (int64_t run = 0; run < runs; run++) {
        plain += sums[(run * in.channels + c) * 2];
        moment += sums[(run * in.channels + c) * 2 + 1];
      }
      if (g.norm_shift) g.norm_shift[first + c] = static_cast<T>(plain);
      if (g.norm_scale) g.norm_scale[first + c] = static_cast<T>(moment);
    }
  }
}

template <class T>
void backward(const Problem& p, Planes<const T> dy, const Gradients<T>& g) {
  if (wide(p)) return backward_wide(p, dy, g);
  const int64_t tiles = p.tiling.count(), filters = p.channels * p.taps * p.outputs;
  // Few partial sums where each is large.
  const int64_t affordable = std::max<int64_t>(1, (int64_t(1) << 24) / std::max<int64_t>(1, filters));
  const int64_t chunks = std::min(std::min(tiles, kConvChunks), affordable);
  const bool pull = !g.states.empty() || g.norm_scale || g.norm_shift;
  const bool plain = p.activation.kind == ActivationKind::identity && !p.norm_scale && !p.norm_shift;
  std::vector<T> packed(pull ? filters : 0), partial(g.weight ? chunks * filters : 0);
  const int64_t row = 2 * p.channels + p.outputs;  // sums of v and v * x for each channel, of dy for each output
  std::vector<double> sums(chunks * row);
  for (int64_t c = 0, s = 0; pull && s < int64_t(p.states.size()); c += p.states[s++].size(1))
    pack_transposed(elements_of<const T>(p.weight), p.outputs, p.channels, p.taps, T(p.scale), c,
                    c + p.states[s].size(1), packed.data() + c * p.outputs * p.taps);

  const int64_t length = p.tiling.largest().length(), planes = p.outputs + 4 * kConvGroup + 1;
  const int64_t bytes = 2 * Scratch::bytes<int64_t>(p.taps) + Scratch::bytes<T>(planes * length);
  const T* const none = nullptr;
  parallel_chunks(chunks, tiles, [&](int64_t chunk, int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    int64_t *taps = scratch.take<int64_t>(p.taps), *mirrored = scratch.take<int64_t>(p.taps);
    T* const base = scratch.take<T>(planes * length);
    double* const sum = sums.data() + chunk * row;
    T* const dweight = partial.data() + chunk * filters;
    for (int64_t i = begin; i < end; i++) {
      const Tile tile = p.tiling.tile(i);
      const FlatPlane& f = tile.flat;
      tap_offsets(f, false, taps);
      tap_offsets(f, true, mirrored);
      T* mask = base + f.origin();
      T *copy = mask + f.length(), *values = copy + kConvGroup * f.length(), *slopes = values + kConvGroup * f.length();
      T *products = slopes + kConvGroup * f.length(), *gradients = products + kConvGroup * f.length();
      if (!p.in_place && !plain) fill_mask(tile, mask);
      const Planes<const T> dy_tile = at(dy, tile.image, 0);
      // A copy even where they could be read in place: every group of channels reads all of them, and planes are often a
      // multiple of 4 KiB apart, which are in one set of the first-level cache.
      DNL_ISA_CALL(load_planes<T>(tile, dy_tile, p.outputs, none, none, kIdentity, gradients));
      const Stack<const T> grad{gradients, f.length()};
      for (int64_t o = 0; g.bias && o < p.outputs; o++)
        for (int64_t b = 0; b < f.images; b++) {
          const int64_t pixels = f.rows * f.width;
          double mean, deviations;
          DNL_ISA_CALL(moments<T>(at(dy_tile, b, o).data + tile.row * f.width, pixels, &mean, &deviations));
          sum[2 * p.channels + o] += mean * pixels;
        }
      int64_t channel = 0;
      for (size_t s = 0; s < p.states.size(); channel += p.states[s++].size(1))
        for_each_group(p.states[s].size(1), [&](int64_t c, int64_t n) {
          const int64_t at_channel = channel + c;
          const T* a = from_channel<T>(p.norm_scale, at_channel);
          const Planes<const T> x = at(planes_of<const T>(p.states[s]), tile.image, c);
          const Stack<const T> u = read(p, tile, x, n, none, none, kIdentity, copy);
          Stack<const T> value = u, slope{nullptr, 0};
          if (!plain) {
            const bool relu = p.activation.kind == ActivationKind::relu;  // its values tell the slope
            activate_tile<T>(f, u, n, a, from_channel<T>(p.norm_shift, at_channel), p.in_place ? nullptr : mask,
                             p.activation, values, relu ? nullptr : slopes);
            value = {values, f.length()};
            if (!relu) slope = {slopes, f.length()};
          }
          if (pull) {
            const T* w = packed.data() + at_channel * p.outputs * p.taps;
            const bool wanted = !g.states.empty(), in_place_now = wanted && p.in_place;
            const Planes<T> to = wanted ? at(g.states[s], tile.image, c) : Planes<T>{nullptr, 0, 0};
            const Stack<T> total = in_place_now ? in_place(tile, to) : Stack<T>{products, f.length()};
            const bool add = in_place_now && g.accumulate;
            if (plain) {
              DNL_ISA_CALL(convolve<T>(f, grad, p.outputs, mirrored, p.taps, w, n, none, add, total, Ahead{}));
            } else {
              double moment[2 * kConvGroup] = {};
              DNL_ISA_CALL(convolve_back<T>(f, grad, p.outputs, mirrored, p.taps, w, n, value, slope, u, a, add, total,
                                            moment));
              for (int64_t k = 0; k < n; k++) {
                sum[2 * (at_channel + k)] += moment[k];
                sum[2 * (at_channel + k) + 1] += moment[kConvGroup + k];
              }
            }
            if (wanted && !p.in_place) {
              if (g.accumulate) {
                DNL_ISA_CALL(add_planes<T>(tile, total.read(), n, to));
              } else {
                DNL_ISA_CALL(store_planes<T>(tile, total.read(), n, to));
              }
            }
          }
          if (g.weight)
            for_each_group(p.outputs, [&](int64_t o, int64_t outputs) {
              DNL_ISA_CALL(weight_gradient<T>(f, value, n, taps, p.taps, grad.plane(o), outputs,
                                              dweight + at_channel * p.taps * p.outputs + o, p.outputs));
            });
        });
    }
  });

  const auto total = [&](int64_t i) {
    double s = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) s += sums[chunk * row + i];
    return static_cast<T>(s);
  };
  for (int64_t c = 0; c < p.channels; c++) {
    if (g.norm_shift) g.norm_shift[c] = total(2 * c);
    if (g.norm_scale) g.norm_scale[c] = total(2 * c + 1);
  }
  for (int64_t o = 0; g.bias && o < p.outputs; o++) g.bias[o] = total(2 * p.channels + o);
  for (int64_t s = 0; g.weight && s < p.channels * p.taps; s++)
    for (int64_t o = 0; o < p.outputs; o++) {
      double w = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) w += partial[chunk * filters + s * p.outputs + o];
      g.weight[o * p.channels * p.taps + s] = static_cast<T>(w * p.scale);
    }
}

Tensor dense_conv2d_fwd(const std::vector<Tensor>& states, const Tensor& weight, const std::optional<Tensor>& bias_in,
                        const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift,
                        const std::string& activation, double scale) {
  const Problem p = prepare(states, weight, norm_scale, norm_shift, activation, scale);
  const auto bias = prepared(bias_in, p.outputs, "bias");
  Tensor y = in_large_pages(torch::stable::new_empty(p.weight, {p.batch, p.outputs, p.height, p.width}));
  dispatch_float("dense_conv2d", y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    forward<T>(p, data_or_null<T>(bias), planes_of<T>(y));
  });
  return narrowed(y, weight.scalar_type());
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> dense_conv2d_bwd(
    const Tensor& dy_in, const std::vector<Tensor>& states, const Tensor& weight,
    const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift, const std::string& activation,
    double scale, bool need_states, bool need_weight, bool need_bias, bool need_norm) {
  const Problem p = prepare(states, weight, norm_scale, norm_shift, activation, scale);
  DNL_CHECK(dy_in.dim() == 4 && dy_in.size(0) == p.batch && dy_in.size(1) == p.outputs && dy_in.size(2) == p.height &&
                dy_in.size(3) == p.width,
            "dense_conv2d: dy has the wrong shape");
  const Tensor dy = with_dense_planes(dy_in);
  std::vector<Tensor> dstates;
  for (size_t s = 0; need_states && s < p.states.size(); s++)
    dstates.push_back(
        in_large_pages(torch::stable::new_empty(p.weight, {p.batch, p.states[s].size(1), p.height, p.width})));
  const auto empty = [&](bool wanted, std::vector<int64_t> sizes) {
    if (!wanted) sizes[0] = 0;
    return torch::stable::new_empty(p.weight, {sizes.data(), sizes.size()});
  };
  Tensor dweight = empty(need_weight, {p.outputs, p.channels, p.size, p.size}), dbias = empty(need_bias, {p.outputs});
  Tensor dscale = empty(need_norm && norm_scale.has_value(), {p.channels});
  Tensor dshift = empty(need_norm && norm_shift.has_value(), {p.channels});
  dispatch_float("dense_conv2d", p.weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto pointer = [](Tensor& t, bool wanted) { return wanted ? static_cast<T*>(t.data_ptr()) : nullptr; };
    Gradients<T> g{{},
                   pointer(dweight, need_weight),
                   pointer(dbias, need_bias),
                   pointer(dscale, need_norm && norm_scale.has_value()),
                   pointer(dshift, need_norm && norm_shift.has_value())};
    for (Tensor& d : dstates) g.states.push_back(planes_of<T>(d));
    backward<T>(p, planes_of<const T>(dy), g);
  });
  const ScalarType type = weight.scalar_type();
  for (Tensor& d : dstates) d = narrowed(d, type);
  return {dstates, narrowed(dweight, type), narrowed(dbias, type), narrowed(dscale, type), narrowed(dshift, type)};
}

// The same, where the gradients of the states are added to `total`: of a block's buffer, which several layers read.
std::tuple<Tensor, Tensor, Tensor, Tensor> dense_conv2d_pull(
    const Tensor& dy_in, const std::vector<Tensor>& states, const Tensor& weight,
    const std::optional<Tensor>& norm_scale, const std::optional<Tensor>& norm_shift, const std::string& activation,
    double scale, const std::vector<Tensor>& total) {
  const Problem p = prepare(states, weight, norm_scale, norm_shift, activation, scale);
  const Tensor dy = with_dense_planes(dy_in);
  DNL_CHECK(dy.dim() == 4 && dy.size(0) == p.batch && dy.size(1) == p.outputs && dy.size(2) == p.height &&
                dy.size(3) == p.width && dy.scalar_type() == p.weight.scalar_type(),
            "dense_conv2d: dy has the wrong shape or type");
  DNL_CHECK(total.size() == p.states.size(), "dense_conv2d: as many gradients as states");
  for (size_t s = 0; s < total.size(); s++)
    DNL_CHECK(same_sizes(total[s], p.states[s]) && total[s].scalar_type() == p.weight.scalar_type() &&
                  has_dense_planes(total[s]),
              "dense_conv2d: a gradient differs from its state");
  const auto empty = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(p.weight, sizes); };
  Tensor dweight = empty({p.outputs, p.channels, p.size, p.size}), dbias = empty({p.outputs});
  Tensor dscale = empty({p.channels}), dshift = empty({p.channels});
  dispatch_float("dense_conv2d", p.weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto pointer = [](Tensor& t) { return static_cast<T*>(t.data_ptr()); };
    Gradients<T> g{{}, pointer(dweight), pointer(dbias), pointer(dscale), pointer(dshift), true};
    for (const Tensor& t : total) g.states.push_back(planes_of<T>(t));
    backward<T>(p, planes_of<const T>(dy), g);
  });
  return {dweight, dbias, dscale, dshift};
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("dense_conv2d_fwd", TORCH_BOX(&dnl::dense_conv2d_fwd));
  m.impl("dense_conv2d_bwd", TORCH_BOX(&dnl::dense_conv2d_bwd));
  m.impl("dense_conv2d_pull", TORCH_BOX(&dnl::dense_conv2d_pull));
}
