// The layer's non-local operator on the CPU, x = W_o concat_heads(attention(W_q y, W_k y, W_v y)), sample by sample:
// projections and their gradients are nowhere but in cache. y, x and their gradients are [B, channels, N] of any strides,
// so that images and tokens, whole or part of a buffer, are one case. Meaning: ops/dnl_layer/projected.py.
#include <algorithm>

#include "common/conv_host.h"
#include "nonlocal_attention/host.h"

namespace dnl {
namespace {

constexpr int64_t kPositions = 256;  // multiplied at a time: as many channels as a layer has fit in the first-level cache

// The maps of y, side by side: rows of W_q, of W_k unless the query is the key, and of W_v; and W_o. In the type that is
// computed in, as are the tensors below.
struct Maps {
  std::vector<Tensor> weights;
  std::vector<std::optional<Tensor>> biases;
  Tensor output_weight;
  std::optional<Tensor> output_bias, bandwidth;
  int64_t heads, channels, rows = 0, width, value_width, outputs;
  bool shared, biased = false;

  Maps(const std::vector<Tensor>& weights_in, const std::vector<std::optional<Tensor>>& biases_in,
       const Tensor& output_weight_in, const std::optional<Tensor>& output_bias_in,
       const std::optional<Tensor>& bandwidth_in, int64_t heads, int64_t channels)
      : output_weight(widened(output_weight_in)), heads(heads), channels(channels), shared(weights_in.size() == 2) {
    const ScalarType type = output_weight.scalar_type();
    DNL_CHECK((shared || weights_in.size() == 3) && biases_in.size() == weights_in.size() && heads > 0,
              "dnl_layer: maps of query, key and value");
    for (size_t i = 0; i < weights_in.size(); i++) {
      const Tensor& w = weights_in[i];
      const std::optional<Tensor>& b = biases_in[i];
      DNL_CHECK(w.dim() == 2 && w.size(1) == channels && w.size(0) % heads == 0 && w.size(0) > 0 &&
                    (!b.has_value() || b->numel() == w.size(0)),
                "dnl_layer: the map of query, key or value has the wrong shape");
      weights.push_back(widened(w));
      biases.push_back(b.has_value() ? std::optional<Tensor>(widened(*b)) : std::nullopt);
      DNL_CHECK(weights[i].scalar_type() == type && (!b.has_value() || biases[i]->scalar_type() == type),
                "dnl_layer: element types differ");
      biased = biased || b.has_value();
      rows += w.size(0);
    }
    width = weights[0].size(0) / heads;
    value_width = weights.back().size(0) / heads;
    outputs = output_weight.size(0);
    DNL_CHECK((shared || weights[1].size(0) == weights[0].size(0)) && output_weight.dim() == 2 &&
                  output_weight.size(1) == heads * value_width && outputs > 0 &&
                  (!output_bias_in.has_value() || output_bias_in->numel() == outputs) &&
                  (!bandwidth_in.has_value() || bandwidth_in->numel() == heads),
              "dnl_layer: sizes do not match");
    if (output_bias_in.has_value()) output_bias = widened(*output_bias_in);
    DNL_CHECK(!output_bias.has_value() || output_bias->scalar_type() == type, "dnl_layer: element types differ");
    if (bandwidth_in.has_value())
      bandwidth = torch::stable::contiguous(torch::stable::to(*bandwidth_in, ScalarType::Double));
  }

  int64_t attended() const { return heads * value_width; }

  // [R, G] and [R], of which parts without a bias are zero.
  template <class T>
  std::vector<T> weight() const {
    std::vector<T> all;
    for (const Tensor& w : weights) {
      const T* data = static_cast<const T*>(w.const_data_ptr());
      all.insert(all.end(), data, data + w.numel());
    }
    return all;
  }
  template <class T>
  std::vector<T> bias() const {
    std::vector<T> all(biased ? rows : 0);
    T* to = all.data();
    for (size_t i = 0; i < weights.size(); to += biased ? weights[i].size(0) : 0, i++)
      if (biases[i].has_value())
        std::copy_n(static_cast<const T*>(biases[i]->const_data_ptr()), weights[i].size(0), to);
    return all;
  }
};

// Some samples side by side in the planes of a scratch, `step` apart, so that those with few positions are multiplied at
// once. Each ends in zeros: they meet the positions beyond the last in the gradient of a map.
struct Group {
  int64_t first, count, step, positions;

  int64_t span() const { return (count - 1) * step + positions; }
};

// How a batch is cut into groups and those into chunks, each of which has sums of its own: by its sizes alone.
struct Groups {
  static constexpr int64_t kChunks = 32, kLeast = 8;
  int64_t batch, positions, samples, step;

  Groups(int64_t batch, int64_t positions) : batch(batch), positions(positions), samples(1), step(positions) {
    if (positions == 0 || positions >= kPositions) return;
    samples = std::min(ceil_div(kPositions, positions), ceil_div(std::max<int64_t>(batch, 1), kLeast));
    step = ceil_div(positions, kPlaneAlign) * kPlaneAlign;
  }
  int64_t count() const { return ceil_div(batch, samples); }
  int64_t chunks() const { return std::min(count(), kChunks); }
  Group group(int64_t i) const { return {i * samples, std::min(samples, batch - i * samples), step, positions}; }
  // Between planes: with room for a last vector.
  int64_t length() const { return FlatPlane{1, 1, samples * step, 0}.length(); }

  // Runs body(chunk, group) for all: in parallel, or, where there are fewer groups than threads, one after another, so
  // that the attention of one uses all of them.
  template <class Body>
  void for_each(Body body) const {
    const auto run = [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) body(chunk, group(i));
    };
    if (count() >= free_threads()) return parallel_chunks(chunks(), count(), run);
    for (int64_t c = 0; c < chunks(); c++) run(c, c * count() / chunks(), (c + 1) * count() / chunks());
  }
};

// Calls body(element, its place in the stack) for the group's part of a tensor [B, channels, N], in the order in which the
// elements lie.
template <class T, class S, class Body>
void for_each_element(const Tensor& t, const Group& g, Stack<S> s, Body body) {
  const int64_t channels = t.size(1), channel = t.stride(1), position = t.stride(2);
  for (int64_t k = 0; k < g.count; k++) {
    T* from = static_cast<T*>(t.data_ptr()) + (g.first + k) * t.stride(0);
    S* to = s.data + k * g.step;
    if (position == 1)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < g.positions; i++) body(from[c * channel + i], to[c * s.stride + i]);
    else if (position < channel)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < g.positions; i++) body(from[c * channel + i * position], to[c * s.stride + i]);
    else
      for (int64_t i = 0; i < g.positions; i++)
        for (int64_t c = 0; c < channels; c++) body(from[c * channel + i * position], to[c * s.stride + i]);
  }
}

template <class T>
void clear_ends(const Group& g, int64_t channels, Stack<T> s) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t k = 0; k < g.count; k++) {
      T* row = s.plane(c).data + k * g.step;
      std::fill(row + g.positions, k + 1 < g.count ? row + g.step : s.plane(c + 1).data, T(0));
    }
}

template <class T>
void load_group(const Tensor& t, const Group& g, Stack<T> to) {
  for_each_element<const T>(t, g, to, [](const T& x, T& y) { y = x; });
  clear_ends(g, t.size(1), to);
}

template <class T>
void store_group(Stack<T> from, const Group& g, const Tensor& t) {
  for_each_element<T>(t, g, from, [](T& x, const T& y) { x = y; });
}

// to (+)= W from + bias, W as pack_filters or pack_transposed leave it.
template <class T>
void multiply(int64_t n, Stack<const T> from, int64_t channels, const std::vector<T>& packed, int64_t outputs,
              const T* bias, bool accumulate, Stack<T> to) {
  const int64_t tap = 0;
  for (int64_t p = 0; p < n; p += kPositions)
    for_each_group(outputs, [&](int64_t o, int64_t size) {
      const Stack<T> out = to.plane(o);
      DNL_ISA_CALL(convolve<T>({1, 1, std::min(kPositions, n - p), 0}, {from.data + p, from.stride}, channels, &tap, 1,
                               packed.data() + o * channels, size, bias ? bias + o : nullptr, accumulate,
                               {out.data + p, out.stride}, Ahead{}));
    });
}

// gradient[c, o] += sum_p from_c[p] dto_o[p]; bias[o] += sum_p dto_o[p] (nullptr: unwanted)
template <class T>
void multiply_gradient(int64_t n, Stack<const T> from, int64_t channels, Stack<const T> dto, int64_t outputs,
                       T* gradient, double* bias) {
  const int64_t tap = 0;
  for_each_group(outputs, [&](int64_t o, int64_t size) {
    DNL_ISA_CALL(weight_gradient<T>({1, 1, n, 0}, from, channels, &tap, 1, dto.plane(o), size, gradient + o, outputs));
  });
  for (int64_t o = 0; bias && o < outputs; o++) {
    double mean, deviations;
    DNL_ISA_CALL(moments<T>(dto.plane(o).data, n, &mean, &deviations));
    bias[o] += mean * n;
  }
}

template <class T>
std::vector<T> packed(const T* weight, int64_t outputs, int64_t channels) {
  std::vector<T> to(outputs * channels);
  pack_filters(weight, outputs, channels, 1, T(1), to.data());
  return to;
}
template <class T>
std::vector<T> packed_transposed(const T* weight, int64_t outputs, int64_t channels) {
  std::vector<T> to(outputs * channels);
  pack_transposed(weight, outputs, channels, 1, T(1), 0, channels, to.data());
  return to;
}

// A stack as the attention reads it, in which sample g.first comes first.
template <class T>
NonlocalTensor features(const Group& g, Stack<T> s, int64_t width) {
  return {s.data - g.first * g.step, g.step, width * s.stride, 1, s.stride};
}

// The attention's parameters but for a group's own tensors.
template <class T>
struct Attention {
  NonlocalParams params{};
  std::vector<T> centre, radius;  // to which they point

  Attention(const Maps& maps, int64_t batch, int64_t positions)
      : centre(batch * maps.heads * maps.width), radius(batch * maps.heads) {
    NonlocalParams& p = params;
    p.storage = sizeof(T) == 8 ? Storage::float64 : Storage::float32;
    p.batch = batch;
    p.heads = maps.heads;
    p.queries = p.keys = positions;
    p.width = maps.width;
    p.value_width = maps.value_width;
    if (maps.bandwidth.has_value()) p.bandwidth = static_cast<const double*>(maps.bandwidth->const_data_ptr());
    p.scale = 1 / std::sqrt(static_cast<double>(maps.width));
    p.normalize = true;
    p.centre = centres_keys(p) ? centre.data() : nullptr;
    p.radius = radius.data();
  }

  // Those of a group whose projections are `products`.
  NonlocalParams with(const Maps& maps, const Group& g, Stack<T> products) const {
    NonlocalParams p = params;
    const int64_t queries = maps.heads * maps.width;
    p.query = features(g, products, maps.width);
    p.key = features(g, products.plane(maps.shared ? 0 : queries), maps.width);
    p.value = features(g, products.plane(maps.shared ? queries : 2 * queries), maps.value_width);
    return p;
  }
};

// The tensor in the type that is computed in.
Tensor checked(const Tensor& t, int64_t batch, int64_t channels, int64_t positions, ScalarType type, const char* name) {
  DNL_CHECK(t.dim() == 3 && t.size(0) == batch && t.size(1) == channels && t.size(2) == positions, "dnl_layer: ", name,
            " has the wrong shape");
  const Tensor wide = is_half(t.scalar_type()) ? widened(t) : t;
  DNL_CHECK(wide.scalar_type() == type, "dnl_layer: element types differ");
  return wide;
}

// N(y) (+ y) into `out`; returns what the backward pass needs: the attention's output and two numbers per query.
std::tuple<Tensor, Tensor, Tensor> dnl_layer_attend(
    const Tensor& y_in, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
    const Tensor& output_weight, const std::optional<Tensor>& output_bias, const std::optional<Tensor>& bandwidth,
    int64_t heads, bool residual, Tensor out) {
  DNL_CHECK(y_in.dim() == 3, "dnl_layer: y has the wrong shape");
  const int64_t B = y_in.size(0), G = y_in.size(1), N = y_in.size(2);
  const Maps maps(weights, biases, output_weight, output_bias, bandwidth, heads, G);
  const ScalarType type = maps.output_weight.scalar_type();
  const Tensor y = checked(y_in, B, G, N, type, "y");
  DNL_CHECK(!residual || maps.outputs == G, "dnl_layer: y is added to something of another shape");
  DNL_CHECK(out.dim() == 3 && out.size(0) == B && out.size(1) == maps.outputs && out.size(2) == N &&
                out.scalar_type() == y_in.scalar_type(),
            "dnl_layer: out has the wrong shape or type");
  const bool apart = is_half(out.scalar_type());  // narrowed at the end
  Tensor x = apart ? torch::stable::new_empty(y, {B, maps.outputs, N}) : out;
  Tensor kept = torch::stable::new_empty(y, {B, maps.attended(), N});
  Tensor shift = torch::stable::new_empty(y, {B, heads, N}), sum = torch::stable::new_empty(y, {B, heads, N});
  dispatch_float("dnl_layer", type, [&](auto zero) {
    using T = decltype(zero);
    const Attention<T> attention(maps, B, N);
    const Groups groups(B, N);
    const int64_t E = maps.attended(), length = groups.length();
    const std::vector<T> bias = maps.bias<T>(), in = packed(maps.weight<T>().data(), maps.rows, G);
    const std::vector<T> last = packed(static_cast<const T*>(maps.output_weight.const_data_ptr()), maps.outputs, E);
    const T* b_in = maps.biased ? bias.data() : nullptr;
    const T* b_out = data_or_null<T>(maps.output_bias);
    groups.for_each([&](int64_t, const Group& g) {
      // Held while the attention's tasks run, which take none.
      Scratch scratch(Scratch::bytes<T>((std::max(G, maps.outputs) + maps.rows + E) * length));
      const Stack<T> source{scratch.take<T>((std::max(G, maps.outputs) + maps.rows + E) * length), length};
      const Stack<T> products = source.plane(std::max(G, maps.outputs)), found = products.plane(maps.rows);
      load_group(y, g, source);
      multiply<T>(g.span(), source.read(), G, in, maps.rows, b_in, false, products);
      NonlocalParams p = attention.with(maps, g, products);
      p.output = features(g, found, maps.value_width);
      p.shift = shift.data_ptr();
      p.sum = sum.data_ptr();
      prepare_keys<T>(p, g.first * heads, (g.first + g.count) * heads);
      attend<T>(p, g.first * heads, (g.first + g.count) * heads);
      store_group(found, g, kept);
      multiply<T>(g.span(), found.read(), E, last, maps.outputs, b_out, residual, source);
      store_group(source, g, x);
    });
  });
  if (apart) torch::stable::copy_(out, x);
  return {narrowed(kept, y_in.scalar_type()), shift, sum};
}

// The gradient of y into `dy`; returns those of the maps, of their biases, of W_o, of its bias and of the bandwidth, empty
// where there is no such tensor. All are in the type that is computed in.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor> dnl_layer_attend_pull(
    const Tensor& dx_in, const Tensor& y_in, const Tensor& attended_in, const Tensor& shift, const Tensor& sum,
    const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases, const Tensor& output_weight,
    const std::optional<Tensor>& output_bias, const std::optional<Tensor>& bandwidth, int64_t heads, bool residual,
    Tensor dy) {
  DNL_CHECK(y_in.dim() == 3, "dnl_layer: y has the wrong shape");
  const int64_t B = y_in.size(0), G = y_in.size(1), N = y_in.size(2);
  const Maps maps(weights, biases, output_weight, output_bias, bandwidth, heads, G);
  const ScalarType type = maps.output_weight.scalar_type();
  const int64_t R = maps.rows, O = maps.outputs, E = maps.attended(), D = heads * maps.width;
  const Tensor y = checked(y_in, B, G, N, type, "y"), dx = checked(dx_in, B, O, N, type, "dx");
  DNL_CHECK(!residual || O == G, "dnl_layer: y is added to something of another shape");
  const Tensor attended = checked(attended_in, B, E, N, type, "the attention's output");
  DNL_CHECK(same_sizes(dy, y) && dy.scalar_type() == type, "dnl_layer: dy has the wrong shape or type");
  for (const Tensor* t : {&shift, &sum})
    DNL_CHECK(t->numel() == B * heads * N && t->scalar_type() == type && t->is_contiguous(),
              "dnl_layer: shift or sum differ from what the forward returned");
  const auto empty = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(y, sizes); };
  std::vector<Tensor> dweights, dbiases;
  for (size_t i = 0; i < maps.weights.size(); i++) {
    dweights.push_back(empty({maps.weights[i].size(0), G}));
    dbiases.push_back(empty({maps.biases[i].has_value() ? maps.weights[i].size(0) : 0}));
  }
  Tensor doutput_weight = empty({O, E}), doutput_bias = empty({maps.output_bias.has_value() ? O : 0});
  Tensor dbandwidth = torch::stable::new_empty(y, {bandwidth ? heads : 0}, ScalarType::Double);
  dispatch_float("dnl_layer", type, [&](auto zero) {
    using T = decltype(zero);
    Attention<T> attention(maps, B, N);
    NonlocalParams& shared = attention.params;
    cut_keys(shared);
    std::vector<T> moments(bandwidth ? shared.parts * B * heads * N * 3 : 0);
    std::vector<T> parts(shared.parts > 1 ? shared.parts * B * D * N : 0);
    shared.moments = bandwidth ? moments.data() : nullptr;
    shared.dquery_parts = parts.data();
    shared.shift = const_cast<void*>(shift.const_data_ptr());
    shared.sum = const_cast<void*>(sum.const_data_ptr());
    const Groups groups(B, N);
    const int64_t length = groups.length(), chunks = groups.chunks(), gradients = R * G + E * O;
    const std::vector<T> weight = maps.weight<T>(), bias = maps.bias<T>();
    const T* const last = static_cast<const T*>(maps.output_weight.const_data_ptr());
    const std::vector<T> in = packed(weight.data(), R, G), back = packed_transposed(weight.data(), R, G);
    const std::vector<T> last_back = packed_transposed(last, O, E);
    std::vector<T> partial(chunks * gradients);
    std::vector<double> sums(chunks * (R + O));
    const int64_t planes = O + E + G + R + E + 2 * D + E + std::max(G, D);
    groups.for_each([&](int64_t chunk, const Group& g) {
      // Held while the attention's tasks run, which take none.
      Scratch scratch(Scratch::bytes<T>(planes * length));
      const Stack<T> given{scratch.take<T>(planes * length), length};
      const Stack<T> found = given.plane(O), source = found.plane(E), products = source.plane(G);
      const Stack<T> dfound = products.plane(R), all = dfound.plane(E), spare = all.plane(2 * D + E);
      const int64_t span = g.span();
      load_group(dx, g, given);
      load_group(attended, g, found);
      load_group(y, g, source);
      multiply<T>(span, source.read(), G, in, R, maps.biased ? bias.data() : nullptr, false, products);
      multiply<T>(span, given.read(), O, last_back, E, nullptr, false, dfound);
      T* const partial_in = partial.data() + chunk * gradients;
      double* const sum_in = sums.data() + chunk * (R + O);
      multiply_gradient<T>(span, found.read(), E, given.read(), O, partial_in + R * G,
                           maps.output_bias.has_value() ? sum_in + R : nullptr);
      NonlocalParams p = attention.with(maps, g, products);
      p.output = features(g, found, maps.value_width);
      p.doutput = features(g, dfound, maps.value_width);
      p.dquery = features(g, all, maps.width);
      p.dkey = features(g, all.plane(D), maps.width);
      p.dvalue = features(g, all.plane(2 * D), maps.value_width);
      const int64_t first = g.first * heads, end = first + g.count * heads;
      prepare_keys<T>(p, first, end);
      if (needs_anchor<T>(p, first, end)) find_anchor<T>(p, features(g, spare, maps.width), first, end);
      attend_back<T>(p, first, end);
      clear_ends(g, 2 * D + E, all);
      for (int64_t i = 0; maps.shared && i < D; i++) {
        const T* from = all.plane(i).data;
        T* to = all.plane(D + i).data;
        for (int64_t n = 0; n < span; n++) to[n] += from[n];
      }
      const Stack<T> dproducts = all.plane(maps.shared ? D : 0), dsource = spare;
      if (residual) std::copy_n(given.data, G * length, dsource.data);
      multiply<T>(span, dproducts.read(), R, back, G, nullptr, residual, dsource);
      store_group(dsource, g, dy);
      multiply_gradient<T>(span, source.read(), G, dproducts.read(), R, partial_in, maps.biased ? sum_in : nullptr);
    });
    // Partial sums of the chunks, in their order; those of maps are [channel, row], with `rows` side by side.
    const auto total = [&](const auto& from, int64_t row, int64_t i) {
      double s = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) s += from[chunk * row + i];
      return static_cast<T>(s);
    };
    const auto of_map = [&](const Tensor& t, int64_t offset, int64_t rows) {
      T* const to = static_cast<T*>(t.data_ptr());
      for (int64_t o = 0; o < t.size(0); o++)
        for (int64_t c = 0; c < t.size(1); c++)
          to[o * t.size(1) + c] = total(partial, gradients, offset + c * rows + o);
    };
    const auto of_bias = [&](const Tensor& t, int64_t offset) {
      for (int64_t o = 0; o < t.numel(); o++) static_cast<T*>(t.data_ptr())[o] = total(sums, R + O, offset + o);
    };
    for (int64_t i = 0, first = 0; i < int64_t(dweights.size()); first += dweights[i++].size(0)) {
      of_map(dweights[i], first, R);
      of_bias(dbiases[i], first);
    }
    of_map(doutput_weight, R * G, O);
    of_bias(doutput_bias, R);
    if (bandwidth) reduce_moments(shared, moments.data(), static_cast<double*>(dbandwidth.data_ptr()));
  });
  return {dweights, dbiases, doutput_weight, doutput_bias, narrowed(dbandwidth, type)};
}

}  // namespace
}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl, CPU, m) {
  m.impl("dnl_layer_attend", TORCH_BOX(&dnl::dnl_layer_attend));
  m.impl("dnl_layer_attend_pull", TORCH_BOX(&dnl::dnl_layer_attend_pull));
}
