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

// The planes of a sample in a scratch have room for a last vector beyond the positions.
FlatPlane positions_of(int64_t n) { return {1, 1, n, 0}; }

// A sample of a tensor [B, channels, N].
template <class T>
struct Sample {
  T* data;
  int64_t channel, position;  // strides

  Sample(const Tensor& t, int64_t b)
      : data(static_cast<T*>(t.data_ptr()) + b * t.stride(0)), channel(t.stride(1)), position(t.stride(2)) {}

  // Calls body(element, c, i) for all of them, in the order in which they lie.
  template <class Body>
  void for_each(int64_t channels, int64_t n, Body body) const {
    if (position <= channel)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < n; i++) body(data[c * channel + i * position], c, i);
    else
      for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < channels; c++) body(data[c * channel + i * position], c, i);
  }
};

// What is multiplied ends in zeros: they meet the positions beyond the last in the gradient of a map.
template <class T>
void load_sample(Sample<const T> from, int64_t channels, int64_t n, Stack<T> to) {
  if (from.position == 1)
    for (int64_t c = 0; c < channels; c++) std::copy_n(from.data + c * from.channel, n, to.plane(c).data);
  else
    from.for_each(channels, n, [&](T x, int64_t c, int64_t i) { to.data[c * to.stride + i] = x; });
  for (int64_t c = 0; c < channels; c++) std::fill(to.plane(c).data + n, to.plane(c + 1).data, T(0));
}

template <class T>
void store_sample(Stack<T> from, int64_t channels, int64_t n, Sample<T> to) {
  if (to.position == 1)
    for (int64_t c = 0; c < channels; c++) std::copy_n(from.plane(c).data, n, to.data + c * to.channel);
  else
    to.for_each(channels, n, [&](T& x, int64_t c, int64_t i) { x = from.data[c * from.stride + i]; });
}

// to (+)= W from + bias, W as pack_filters or pack_transposed leave it.
template <class T>
void multiply(int64_t n, Stack<const T> from, int64_t channels, const std::vector<T>& packed, int64_t outputs,
              const T* bias, bool accumulate, Stack<T> to) {
  const int64_t tap = 0;
  for (int64_t p = 0; p < n; p += kPositions)
    for_each_group(outputs, [&](int64_t o, int64_t size) {
      const Stack<T> out = to.plane(o);
      DNL_ISA_CALL(convolve<T>(positions_of(std::min(kPositions, n - p)), {from.data + p, from.stride}, channels, &tap, 1,
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
    DNL_ISA_CALL(weight_gradient<T>(positions_of(n), from, channels, &tap, 1, dto.plane(o), size, gradient + o, outputs));
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

// A stack as the attention reads it, of whichever sample.
template <class T>
NonlocalTensor features(Stack<T> s, int64_t width) {
  return {const_cast<std::remove_const_t<T>*>(s.data), 0, width * s.stride, 1, s.stride};
}

// The attention's parameters but for a sample's own tensors.
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

  // Those of a sample whose projections are `products`.
  NonlocalParams with(const Maps& maps, Stack<T> products) const {
    NonlocalParams p = params;
    const int64_t queries = maps.heads * maps.width;
    p.query = features(products, maps.width);
    p.key = features(products.plane(maps.shared ? 0 : queries), maps.width);
    p.value = features(products.plane(maps.shared ? queries : 2 * queries), maps.value_width);
    return p;
  }
};

// Runs body(chunk, sample) for all samples in a fixed number of chunks: in parallel, or, where there are fewer samples
// than threads, one after another, so that the attention of a sample uses all of them.
constexpr int64_t kChunks = 32;
template <class Body>
void for_each_sample(int64_t batch, Body body) {
  const int64_t chunks = std::min(batch, kChunks);
  const auto run = [&](int64_t chunk, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) body(chunk, b);
  };
  if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) return parallel_chunks(chunks, batch, run);
  for (int64_t c = 0; c < chunks; c++) run(c, c * batch / chunks, (c + 1) * batch / chunks);
}

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
    const int64_t E = maps.attended(), length = positions_of(N).length();
    const std::vector<T> bias = maps.bias<T>(), in = packed(maps.weight<T>().data(), maps.rows, G);
    const std::vector<T> last = packed(static_cast<const T*>(maps.output_weight.const_data_ptr()), maps.outputs, E);
    const T* b_in = maps.biased ? bias.data() : nullptr;
    const T* b_out = data_or_null<T>(maps.output_bias);
    for_each_sample(B, [&](int64_t, int64_t b) {
      Scratch scratch(Scratch::bytes<T>((std::max(G, maps.outputs) + maps.rows + E) * length));
      const Stack<T> source{scratch.take<T>((std::max(G, maps.outputs) + maps.rows + E) * length), length};
      const Stack<T> products = source.plane(std::max(G, maps.outputs)), found = products.plane(maps.rows);
      load_sample<T>({y, b}, G, N, source);
      multiply<T>(N, source.read(), G, in, maps.rows, b_in, false, products);
      NonlocalParams p = attention.with(maps, products);
      p.output = features(found, maps.value_width);
      p.shift = shift.data_ptr();
      p.sum = sum.data_ptr();
      prepare_keys<T>(p, b * heads, (b + 1) * heads);
      attend<T>(p, b * heads, (b + 1) * heads);
      store_sample<T>(found, E, N, {kept, b});
      multiply<T>(N, found.read(), E, last, maps.outputs, b_out, residual, source);
      store_sample<T>(source, maps.outputs, N, {x, b});
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
    const int64_t length = positions_of(N).length(), chunks = std::min(B, kChunks), gradients = R * G + E * O;
    const std::vector<T> weight = maps.weight<T>(), bias = maps.bias<T>();
    const T* const last = static_cast<const T*>(maps.output_weight.const_data_ptr());
    const std::vector<T> in = packed(weight.data(), R, G), back = packed_transposed(weight.data(), R, G);
    const std::vector<T> last_back = packed_transposed(last, O, E);
    std::vector<T> partial(chunks * gradients);
    std::vector<double> sums(chunks * (R + O));
    const int64_t planes = O + E + G + R + E + 2 * D + E + std::max(G, D);
    for_each_sample(B, [&](int64_t chunk, int64_t b) {
      Scratch scratch(Scratch::bytes<T>(planes * length));
      const Stack<T> given{scratch.take<T>(planes * length), length};
      const Stack<T> found = given.plane(O), source = found.plane(E), products = source.plane(G);
      const Stack<T> dfound = products.plane(R), all = dfound.plane(E), spare = all.plane(2 * D + E);
      load_sample<T>({dx, b}, O, N, given);
      load_sample<T>({attended, b}, E, N, found);
      load_sample<T>({y, b}, G, N, source);
      multiply<T>(N, source.read(), G, in, R, maps.biased ? bias.data() : nullptr, false, products);
      multiply<T>(N, given.read(), O, last_back, E, nullptr, false, dfound);
      T* const partial_in = partial.data() + chunk * gradients;
      double* const sum_in = sums.data() + chunk * (R + O);
      multiply_gradient<T>(N, found.read(), E, given.read(), O, partial_in + R * G,
                           maps.output_bias.has_value() ? sum_in + R : nullptr);
      NonlocalParams p = attention.with(maps, products);
      p.output = features(found, maps.value_width);
      p.doutput = features(dfound, maps.value_width);
      p.dquery = features(all, maps.width);
      p.dkey = features(all.plane(D), maps.width);
      p.dvalue = features(all.plane(2 * D), maps.value_width);
      const int64_t first = b * heads, end = first + heads;
      prepare_keys<T>(p, first, end);
      if (needs_anchor<T>(p, first, end)) find_anchor<T>(p, features(spare, maps.width), first, end);
      attend_back<T>(p, first, end);
      for (int64_t i = 0; maps.shared && i < D; i++) {
        const T* from = all.plane(i).data;
        T* to = all.plane(D + i).data;
        for (int64_t n = 0; n < N; n++) to[n] += from[n];
      }
      const Stack<T> dproducts = all.plane(maps.shared ? D : 0), dsource = spare;
      if (residual) std::copy_n(given.data, G * length, dsource.data);
      multiply<T>(N, dproducts.read(), R, back, G, nullptr, residual, dsource);
      store_sample<T>(dsource, G, N, {dy, b});
      multiply_gradient<T>(N, source.read(), G, dproducts.read(), R, partial_in, maps.biased ? sum_in : nullptr);
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
