// The gradients of dnl_layer's arithmetic in half types, on tensor cores (tensor_cores.cuh).
#pragma once
#include "dnl_layer/tensor_cores.cuh"

namespace dnl {

template <class T>
struct LayerTensorCoresBackward : LayerTensorCores<T> {
  using Base = LayerTensorCores<T>;
  using typename Base::HeadSums;
  using typename Base::Operand;
  using typename Base::Weights;
  using Base::kSteps;
  using Base::add_weighted, Base::attend, Base::find_biases, Base::for_each_block, Base::load_left, Base::products;
  using Base::my_octet, Base::my_position, Base::load_octet, Base::put_activated;
  using Base::alpha_of, Base::project_all, Base::row_sum;

  // store(a, b, sum_n rows_a[n] m[n, b]) for a < a_count, b < b_count.
  template <class Store>
  DNL_DEVICE static void outer(const LayerSizes& s, const float* rows, int a_count, const Octets<T>& m, int b_count,
                               Store store) {
    const int across = (b_count + 15) / 16, tiles = (a_count + 15) / 16 * across;
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < tiles; tile += blockDim.x / 32) {
      const int first = tile / across * 16, second = tile % across * 16;
      TileSums d = {};
#pragma unroll 1
      for (int n = 0; n < s.columns; n += 16) {
        uint32_t a[4], b[4];
        left_of_channels<T>(a, rows, s.stride, first, n, a_count);
        m.right(b, n, second);
        multiply<T>(d, a, b);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = first + tile_row(i % 4), column = second + tile_column(i / 4, i % 4);
        if (row < a_count && column < b_count) store(row, column, d[i / 4][i % 4]);
      }
    }
  }

  // ---- gradients of a head ----
  struct Pulled {
    HeadSums first, second;
    float sums[2];  // over a row, of dscore as rounded for the product
    float rho[2], excess[2], mean[2];  // of dscore * score; of dscore, 0 but for rounding; of weight * score
  };

  // What 16 queries get from all keys (first: dq) or, with kKeys, 16 keys from all queries (first: dk, second: dv), before
  // the factor of the scores. first is of queries or keys, second of values or their gradients; row and own are added to
  // the scores, of the others and of the 16.
  template <bool kKeys>
  DNL_DEVICE static void pull(Pulled& out, const LayerSizes& s, const Operand& own_first, const Operand& own_second,
                              const Octets<T>& first, const Octets<T>& second, const float* row, const float (&own)[2],
                              const float* deltas, const float (&own_delta)[2], float alpha) {
    const bool exponential = s.kernel != LayerKernel::dot;
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      clear(out.first[i]);
      if (kKeys) clear(out.second[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) out.sums[r] = out.rho[r] = out.excess[r] = out.mean[r] = 0;
#pragma unroll 1
    for (int j = 0; j < s.columns; j += 16) {
      TileSums w, ds;
      products(w, own_first, first, j, s.query_padded);
      products(ds, own_second, second, j, s.value_padded);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int column = j + tile_column(i / 4, i % 4), r = i % 4 / 2;
        float &weight = w[i / 4][i % 4], &gradient = ds[i / 4][i % 4];
        weight *= alpha;
        if (exponential) {
          const float score = weight + row[column];
          weight = exp2f(score + own[r]);
          gradient = weight * (gradient - (kKeys ? deltas[column] : own_delta[r]));
          // Behind the last key the score is -infinity, its gradient 0.
          if (!kKeys && column < s.positions) {
            out.rho[r] += gradient * score;
            out.excess[r] += gradient;
            out.mean[r] += weight * score;
          }
        }
      }
      uint32_t a[4];
      if (kKeys) {
        as_left<T>(a, w);
        add_weighted(out.second, a, second, j, s.value_padded);
      }
      as_left<T>(a, ds);
      if (s.kernel == LayerKernel::gaussian) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 pair = unpack<T>(a[i]);
          out.sums[i % 2] += pair.x + pair.y;
        }
      }
      add_weighted(out.first, a, first, j, s.query_padded);
    }
  }

  // The Gaussian's gradient is of differences: minus the sum of dscore times the own vector. Then the scores' factor.
  DNL_DEVICE static void finish_pull(Pulled& pulled, const LayerSizes& s, const Octets<T>& own, int position, float slope) {
    const bool gaussian = s.kernel == LayerKernel::gaussian;
    const float sums[2] = {row_sum(pulled.sums[0]), row_sum(pulled.sums[1])};
#pragma unroll
    for (int i = 0; i < kSteps; i++)
      if (i * 16 < s.query_padded) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          float2 x = make_float2(0, 0);
          if (gaussian) x = own.pair(position + tile_row(e % 4), i * 16 + tile_column(e / 4, 0));
          float* d = &pulled.first[i][e / 4][e % 4];
          d[0] = slope * (d[0] - sums[e % 4 / 2] * x.x);
          d[1] = slope * (d[1] - sums[e % 4 / 2] * x.y);
        }
      }
  }

  // d of a projection's weight and bias, from the gradient of what it projects to.
  DNL_DEVICE static void projection_gradient(const LayerBackward& p, LayerParameter weight, int head, const Octets<T>& d,
                                             int width, const float* y) {
    const LayerSizes& s = p.sizes;
    if (float* to = gradient(p, weight)) {
      to += head * width * s.width;
      outer(s, y, s.width, d, width, [&](int g, int i, float v) { store_global(to + i * s.width + g, v); });
    }
    if (float* to = gradient(p, static_cast<LayerParameter>(weight + 1)))
      for (int i = threadIdx.x / 32; i < width; i += blockDim.x / 32) {
        float sum = 0;
        for (int n = threadIdx.x % 32; n < s.positions; n += 32) sum += to_float(*d.at(n, i));
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) store_global(to + head * width + i, sum);
      }
  }

  DNL_DEVICE static void head_gradient(const LayerBackward& p, int head, float* shared, const LayerBackwardLayout& at,
                                       const Weights& w, float factor) {
    const LayerSizes& s = p.sizes;
    const bool gaussian = s.kernel == LayerKernel::gaussian;
    const auto octets = [&](int place) { return Octets<T>{reinterpret_cast<T*>(shared + place), s.columns}; };
    const Octets<T> q = octets(at.q), k = octets(at.k), v = octets(at.v), dout = octets(at.dout), t = octets(at.t);
    float *y = shared + at.y, *dz = shared + at.dz, *dy = shared + at.dy, *bias = shared + at.bias;
    float *shifts = shared + at.shift, *deltas = shared + at.delta, *drho = shared + at.drho;
    const float alpha = alpha_of(s, factor), slope = score_slope(s.kernel, factor);
    const bool first_lane = threadIdx.x % 4 == 0;  // of a row

    if (!gaussian) project_all(s, q, y, w.query, w.query_bias, s.query_padded);
    project_all(s, k, y, w.key, w.key_bias, s.query_padded);
    project_all(s, v, y, w.value, w.value_bias, s.value_padded);
    find_biases(s, bias, k, factor);
    __syncthreads();
    // The output of the attention, into t; its gradient.
    for_each_block(s, [&](int position) {
      Operand a;
      HeadSums o;
      float shift[2], delta[2] = {};
      load_left(a, q, position, s.query_padded);
      attend(o, shift, s, a, k, v, bias, alpha);
#pragma unroll
      for (int i = 0; i < kSteps; i++)
        if (i * 16 < s.value_padded) {
          TileSums g = {};
          Base::template project<false>(g, s, dz, s.result, position, w.output, i * 16);
#pragma unroll
          for (int e = 0; e < 8; e++)
            delta[e % 4 / 2] += to_float(from_float<T>(g[e / 4][e % 4])) * o[i][e / 4][e % 4];
          t.put(position, i * 16, o[i], s.positions);
          dout.put(position, i * 16, g, s.positions);
        }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int n = position + tile_row(2 * r);
        delta[r] = row_sum(delta[r]);
        if (!first_lane) continue;
        deltas[n] = n < s.positions ? delta[r] : 0.0f;
        shifts[n] = n < s.positions ? shift[r] : -INFINITY;
      }
    });
    __syncthreads();
    if (float* to = gradient(p, kOutputWeight)) {
      to += head * s.value;
      const int step = s.heads * s.value;
      outer(s, dz, s.result, t, s.value, [&](int r, int e, float value) { store_global(to + r * step + e, value); });
    }
    __syncthreads();
    // Queries: dq into t.
    for_each_block(s, [&](int position) {
      Operand a, g;
      load_left(a, q, position, s.query_padded);
      load_left(g, dout, position, s.value_padded);
      float own[2], delta[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        own[r] = shifts[position + tile_row(2 * r)];
        delta[r] = deltas[position + tile_row(2 * r)];
      }
      Pulled pulled;
      pull<false>(pulled, s, a, g, k, v, bias, own, nullptr, delta, alpha);
      if (gaussian) {  // d score / d rho = -2 score, relative to the row's mean: what is common to a row has no part in it
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float rho = row_sum(pulled.rho[r]) - row_sum(pulled.excess[r]) * row_sum(pulled.mean[r]);
          if (first_lane) drho[position + tile_row(2 * r)] = -2.0f * kLn2 * rho;
        }
      }
      finish_pull(pulled, s, q, position, slope);
#pragma unroll
      for (int i = 0; i < kSteps; i++)
        if (i * 16 < s.query_padded) {
          t.put(position, i * 16, pulled.first[i], s.positions);
          as_left<T>(a[i], pulled.first[i]);
        }
      if (!gaussian) Base::template spread<false>(s, dy, s.width, position, a, s.query_padded, w.query);
    });
    __syncthreads();
    if (!gaussian) projection_gradient(p, kQueryWeight, head, t, s.query, y);
    if (float* to = gradient(p, kRho)) row_sums(to + head, s, drho, 1);
    // Keys and values: 16 of k and v are read by their own warp only, so dk and dv take their place; the Gaussian's dk
    // joins dq.
    const Octets<T> dk = gaussian ? t : k;
    for_each_block(s, [&](int position) {
      Operand a, c;
      load_left(a, k, position, s.query_padded);
      load_left(c, v, position, s.value_padded);
      const float own[2] = {bias[position + tile_row(0)], bias[position + tile_row(2)]};
      Pulled pulled;
      pull<true>(pulled, s, a, c, q, dout, shifts, own, deltas, {0, 0}, alpha);
      finish_pull(pulled, s, k, position, slope);
      __syncwarp();  // all lanes have read k and v
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        if (i * 16 < s.query_padded) {
#pragma unroll
          for (int e = 0; gaussian && e < 8; e += 2) {
            const float2 dq = t.pair(position + tile_row(e % 4), i * 16 + tile_column(e / 4, 0));
            pulled.first[i][e / 4][e % 4] += dq.x;
            pulled.first[i][e / 4][e % 4 + 1] += dq.y;
          }
          dk.put(position, i * 16, pulled.first[i], s.positions);
          as_left<T>(a[i], pulled.first[i]);
        }
        if (i * 16 < s.value_padded) {
          v.put(position, i * 16, pulled.second[i], s.positions);
          as_left<T>(c[i], pulled.second[i]);
        }
      }
      Base::template spread<false>(s, dy, s.width, position, a, s.query_padded, w.key);
      Base::template spread<false>(s, dy, s.width, position, c, s.value_padded, w.value);
    });
    __syncthreads();
    projection_gradient(p, gaussian ? kQueryWeight : kKeyWeight, head, dk, s.query, y);
    projection_gradient(p, kValueWeight, head, v, s.value, y);
  }

  // ---- gradients of the states and of the accumulation's parameters, from dy ----
  DNL_DEVICE static void states_gradient(const LayerBackward& p, const float* dy, float* memory, float* weights) {
    const LayerSizes& s = p.sizes;
    DNL_SHARED(LayerChannel<T>, table, 2 * kLayerChunk);
    LayerChunks<T, kLayerChunk> chunks(table, reinterpret_cast<T*>(weights));
    const Octets<T> states{reinterpret_cast<T*>(memory), s.columns};  // then their gradients
    const Octets<T> activated{reinterpret_cast<T*>(memory + s.matrix(kLayerChunk)), s.columns};
    float* const sums = memory + 2 * s.matrix(kLayerChunk);  // [warp][channel][dx, dx * x]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int begin = 0, state = 0; begin < s.channels + s.skip; begin += kLayerChunk) {
      chunks.stage(p, begin);  // its barrier also ends the reading of the last chunk's operands
      const Octets<T> filters{const_cast<T*>(chunks.filters), s.width_padded};
      float total[4] = {}, moments[4] = {};  // of channels tile_column(i / 2, i % 2)
      for_each_block(s, [&](int position) {
        float x[8];
        load_octet(x, chunks, s, position);
        put_activated(activated, x, chunks, s, position, false);
        Pack<T, 8> pack;
#pragma unroll
        for (int u = 0; u < 8; u++) pack.values[u] = from_float<T>(x[u]);
        *reinterpret_cast<Pack<T, 8>*>(states.at(my_position(position), my_octet())) = pack;
        __syncwarp();
        TileSums d = {};
        Base::template project<false>(d, s, dy, s.width, position, filters, 0);
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const int column = tile_column(e / 4, e % 4);
          const LayerChannel<T>& c = chunks.channels[column];
          if (c.plain) continue;
          const float2 pair = states.pair(position + tile_row(e % 4), column - e % 2);
          const float value = e % 2 ? pair.y : pair.x;
          float& dx = d[e / 4][e % 4];
          dx *= c.factor * activation_slope(s.input_activation, c.scale * value + c.shift);
          total[e / 4 * 2 + e % 2] += dx;
          moments[e / 4 * 2 + e % 2] += dx * value;
          dx *= c.scale;
        }
        __syncwarp();
        states.put(position, 0, d, s.positions);
        __syncwarp();
        const int n = my_position(position);
        if (!p.need_states || n >= s.positions) return;
        pack = *reinterpret_cast<const Pack<T, 8>*>(states.at(n, my_octet()));
        int j = state;
#pragma unroll
        for (int u = 0; u < 8; u++) {
          const int channel = begin + my_octet() + u;
          if (channel >= s.channels + s.skip) break;
          const int64_t place = place_in_state(p, j, channel, n);
          store_global(static_cast<T*>(p.dstates[j]) + place, pack.values[u]);
        }
      });
      while (begin + kLayerChunk < s.channels + s.skip && begin + kLayerChunk >= p.first[state + 1]) state++;
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) {
          total[i] += __shfl_xor_sync(kFullWarp, total[i], bit);
          moments[i] += __shfl_xor_sync(kFullWarp, moments[i], bit);
        }
        if (lane < 4) {
          float* to = sums + (warp * kLayerChunk + tile_column(i / 2, i % 2)) * 2;
          to[0] = total[i];
          to[1] = moments[i];
        }
      }
      __syncthreads();
      const int own = s.channels - begin;  // channels of the chunk that are not the skip input's
      if (threadIdx.x < 2 * kLayerChunk && static_cast<int>(threadIdx.x) / 2 < own) {
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += sums[w * 2 * kLayerChunk + threadIdx.x];
        if (float* to = gradient(p, threadIdx.x % 2 ? kNormScale : kNormShift))
          store_global(to + begin + threadIdx.x / 2, sum);
      }
      float *affine = gradient(p, kAffineWeight), *skip = gradient(p, kSkipWeight);
      outer(s, dy, s.width, activated, s.channels + s.skip - begin < kLayerChunk ? s.channels + s.skip - begin
                                                                                 : kLayerChunk,
            [&](int g, int c, float value) {
              if (c < own && affine) store_global(affine + static_cast<int64_t>(g) * s.channels + begin + c, s.tau * value);
              if (c >= own && skip) store_global(skip + static_cast<int64_t>(g) * s.skip + c - own, value);
            });
    }
  }
};

}  // namespace dnl
