// dnl_layer's arithmetic in float32, by FFMA.
//
// A thread owns the columns threadIdx.x, + blockDim.x, ..: what it alone reads and writes needs no barrier. Only keys and
// values (in the backward pass also queries and their gradients) are read across columns. Scores are in base 2.
#pragma once
#include "dnl_layer/states.cuh"

namespace dnl {

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

// A head's projections in shared memory, each [inputs, outputs rounded up to 4], padded with zeros.
struct HeadWeights {
  const float *query, *key, *value, *output;  // [width, query_padded], .., [width, value_padded], [result, value_padded]
  const float *query_bias, *key_bias, *value_bias;
};

// The rows of a projection of y, zeros in the columns that are padding.
DNL_DEVICE void project_rows(const LayerSizes& s, float* rows, const float* y, const float* w, const float* bias,
                             int width4) {
  for (int n = threadIdx.x; n < s.columns; n += blockDim.x) {
    float out[kLayerWidth] = {};
    if (n < s.positions) gather(out, y + n, s.stride, s.width, w, width4, bias);
    put(rows + n, s.stride, width4, out);
  }
}

// Scores of the vector `a` against columns j .. j + 3 of `rows`; -infinity behind the last position (dot: 0).
DNL_DEVICE void scores4(float (&out)[4], const LayerSizes& s, const float (&a)[kLayerWidth], const float* rows, int j,
                        float factor) {
  float sum[4] = {};
  const bool distances = s.kernel == LayerKernel::gaussian;
#pragma unroll
  for (int d0 = 0; d0 < kLayerWidth; d0 += 4)
    if (d0 < s.query_padded) {
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
      if (e0 < s.value_padded) {
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

// The parts of the two kernels.
struct LayerColumns {
  // y of the sample.
  template <class Params>
  DNL_DEVICE static void accumulate(const Params& p, float* y, float*, float* weights) {
    const LayerSizes& s = p.sizes;
    DNL_SHARED(LayerChannel<float>, table, 2 * kLayerChunk);
    LayerChunks<float, kLayerChunk> chunks(table, weights);
    begin_accumulation<float>(p, y);
    for (int begin = 0; begin < s.channels + s.skip; begin += kLayerChunk) {
      chunks.stage(p, begin);
      for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
        float x[kLayerChunk];
        chunks.load(x, n);
#pragma unroll
        for (int u = 0; u < kLayerChunk; u++) {
          const LayerChannel<float>& c = chunks.channels[u];
          if (!c.plain) x[u] = c.factor * activate(s.input_activation, c.scale * x[u] + c.shift);
        }
        scatter(y + n, s.stride, s.width, chunks.filters, kLayerChunk, x);
      }
    }
  }

  template <class Params>
  DNL_DEVICE static HeadWeights stage_head(const Params& p, int head, float* to) {
    const LayerSizes& s = p.sizes;
    // to[g, d] = weight[head * width + d, g], and a last row for the bias.
    auto transposed = [&](int which, int width, int width4) {
      const float* begin = to;
      for (int i = threadIdx.x; i < (s.width + 1) * width4; i += blockDim.x) {
        const int64_t g = i % (s.width + 1), d = i / (s.width + 1), row = static_cast<int64_t>(head) * width + d;
        float w = 0;
        if (d < width)
          w = g < s.width ? parameter<float>(p.parameters[which], row * s.width + g, 0)
                          : parameter<float>(p.parameters[which + 1], row, 0);
        to[g * width4 + d] = w;
      }
      to += (s.width + 1) * width4;
      return begin;
    };
    HeadWeights w;
    w.query = transposed(kQueryWeight, s.query, s.query_padded);
    w.key = s.kernel == LayerKernel::gaussian ? w.query : transposed(kKeyWeight, s.query, s.query_padded);
    w.value = transposed(kValueWeight, s.value, s.value_padded);
    w.query_bias = w.query + s.width * s.query_padded;
    w.key_bias = w.key + s.width * s.query_padded;
    w.value_bias = w.value + s.width * s.value_padded;
    w.output = to;
    for (int i = threadIdx.x; i < s.result * s.value_padded; i += blockDim.x) {
      const int64_t r = i / s.value_padded;
      const int e = i % s.value_padded;
      to[i] = e < s.value ? parameter<float>(p.parameters[kOutputWeight], r * s.heads * s.value + head * s.value + e, 0) : 0;
    }
    return w;
  }

  // A head's part of z = W_o concat_heads(..), without its bias.
  DNL_DEVICE static void attend_head(const LayerSizes& sizes, const HeadWeights& w, const float* y, float* z, float* k,
                                     float* v, float*, float factor) {
    const LayerSizes s = sizes;
    project_rows(s, k, y, w.key, w.key_bias, s.query_padded);
    project_rows(s, v, y, w.value, w.value_bias, s.value_padded);
    __syncthreads();
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
      float q[kLayerWidth], o[kLayerWidth];
      gather(q, y + n, s.stride, s.width, w.query, s.query_padded, w.query_bias);
      attend(o, s, q, k, v, factor);
      scatter(z + n, s.stride, s.result, w.output, s.value_padded, o);
    }
    __syncthreads();
  }

  // Everything that a head adds.
  DNL_DEVICE static void head_gradient(const LayerBackward& p, int head, float* shared, const LayerBackwardLayout& at,
                                       const HeadWeights& w, float factor) {
    const LayerSizes& s = p.sizes;
    const bool gaussian = s.kernel == LayerKernel::gaussian;
    float *y = shared + at.y, *dz = shared + at.dz, *dy = shared + at.dy, *q = shared + at.q, *k = shared + at.k;
    float *v = shared + at.v, *dout = shared + at.dout, *t = shared + at.t;
    float *shifts = shared + at.shift, *deltas = shared + at.delta, *drho = shared + at.drho;
    const float slope = score_slope(s.kernel, factor);

    if (!gaussian) project_rows(s, q, y, w.query, w.query_bias, s.query_padded);
    project_rows(s, k, y, w.key, w.key_bias, s.query_padded);
    project_rows(s, v, y, w.value, w.value_bias, s.value_padded);
    __syncthreads();
    // The output of the attention, into t; its gradient.
    for (int n = threadIdx.x; n < s.columns; n += blockDim.x) {
      float a[kLayerWidth], o[kLayerWidth] = {}, g[kLayerWidth] = {};
      float shift = 0, delta = 0;
      if (n < s.positions) {
        take(a, q + n, s.stride, s.query_padded);
        shift = attend(o, s, a, k, v, factor);
        gather(g, dz + n, s.stride, s.result, w.output, s.value_padded, nullptr);
#pragma unroll
        for (int e = 0; e < kLayerWidth; e++) delta += g[e] * o[e];
      }
      put(t + n, s.stride, s.value_padded, o);
      put(dout + n, s.stride, s.value_padded, g);
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
      take(a, q + n, s.stride, s.query_padded);
      take(g, dout + n, s.stride, s.value_padded);
      const float shift[4] = {shifts[n], shifts[n], shifts[n], shifts[n]};
      const float delta[4] = {deltas[n], deltas[n], deltas[n], deltas[n]};
      float rho = 0;
#pragma unroll 1
      for (int j = 0; j < s.positions; j += 4) {
        float weight[4], ds[4];
        scores4(weight, s, a, k, j, factor);
        const float score[4] = {weight[0], weight[1], weight[2], weight[3]};
        products4(ds, s, g, v, s.value_padded, j);
        score_gradient(weight, ds, s.kernel, shift, delta);
        add_rows4(dq, s, k, s.query_padded, j, ds, gaussian, a);
        if (gaussian)  // d score / d rho = -2 score
          for (int i = 0; i < 4; i++) rho -= j + i < s.positions ? 2.0f * kLn2 * ds[i] * score[i] : 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kLayerWidth; d++) dq[d] *= slope;
      put(t + n, s.stride, s.query_padded, dq);
      if (!gaussian) scatter(dy + n, s.stride, s.width, w.query, s.query_padded, dq);
      if (gaussian) drho[n] = rho;
    }
    __syncthreads();
    if (!gaussian) projection_gradient(p, kQueryWeight, head, t, s.query, y);
    if (float* to = gradient(p, kRho)) row_sums(to + head, s, drho, 1);
    // Keys and values: a column of k and v is read by its own thread only, so dk and dv take their place; the Gaussian's
    // dk joins dq.
    for (int n = threadIdx.x; n < s.positions; n += blockDim.x) {
      float b[kLayerWidth], c[kLayerWidth], dk[kLayerWidth] = {}, dv[kLayerWidth] = {};
      take(b, k + n, s.stride, s.query_padded);
      take(c, v + n, s.stride, s.value_padded);
#pragma unroll 1
      for (int j = 0; j < s.positions; j += 4) {
        float weight[4], ds[4];
        scores4(weight, s, b, q, j, factor);
        products4(ds, s, c, dout, s.value_padded, j);
        const float4 shift = read4(shifts + j), delta = read4(deltas + j);
        score_gradient(weight, ds, s.kernel, {shift.x, shift.y, shift.z, shift.w}, {delta.x, delta.y, delta.z, delta.w});
        add_rows4(dv, s, dout, s.value_padded, j, weight, false, c);
        add_rows4(dk, s, q, s.query_padded, j, ds, gaussian, b);
      }
#pragma unroll
      for (int d = 0; d < kLayerWidth; d++) dk[d] *= slope;
      if (gaussian) {
        take(b, t + n, s.stride, s.query_padded);
#pragma unroll
        for (int d = 0; d < kLayerWidth; d++) dk[d] += b[d];
      }
      put((gaussian ? t : k) + n, s.stride, s.query_padded, dk);
      put(v + n, s.stride, s.value_padded, dv);
      scatter(dy + n, s.stride, s.width, w.key, s.query_padded, dk);
      scatter(dy + n, s.stride, s.width, w.value, s.value_padded, dv);
    }
    __syncthreads();
    projection_gradient(p, gaussian ? kQueryWeight : kKeyWeight, head, gaussian ? t : k, s.query, y);
    projection_gradient(p, kValueWeight, head, v, s.value, y);
  }

  // The states' gradients and those of the accumulation's parameters, from dy.
  DNL_DEVICE static void states_gradient(const LayerBackward& p, const float* dy, float* rows, float* weights) {
    constexpr int kChunk = kLayerBackwardChunk;
    const LayerSizes& s = p.sizes;
    DNL_SHARED(LayerChannel<float>, table, 2 * kChunk);
    LayerChunks<float, kChunk> chunks(table, weights);
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
          const LayerChannel<float>& c = chunks.channels[u];
          float value = x[u];
          if (!c.plain) {
            const float before = c.scale * x[u] + c.shift;
            value = activate(s.input_activation, before);
            dx[u] *= c.factor * activation_slope(s.input_activation, before);
            if (normed) {
              shift_rows[u * s.stride + n] = dx[u];
              scale_rows[u * s.stride + n] = dx[u] * x[u];
            }
            dx[u] *= c.scale;
          }
          rows[u * s.stride + n] = value;
          if (p.need_states && c.data) {
            const int64_t place = place_in_state(p, j, begin + u, n);
            store_global(static_cast<float*>(p.dstates[j]) + place, dx[u]);
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
};

}  // namespace dnl
