// dnl_layer's arithmetic in half types, on tensor cores.
//
// A warp owns blocks of 16 positions: block threadIdx.x / 32, + the number of warps, .. What it alone reads and writes
// needs no barrier. Sums are floats: y, z, dz and dy as rows in shared memory, all else in registers. Operands are
// rounded to the element type: y, q, k, v, the weights of the attention, its result, and their gradients, which eager
// PyTorch rounds as well. Columns behind the last position are zero in rows and octets alike.
//
// A score is alpha q.k + bias_j (+ what belongs to the query alone and cancels), in base 2. The Gaussian's alpha is
// -2 c and its bias c |k_j|^2, c = -1 / (2 h^2 ln 2): squared distances as products, of the rounded vectors themselves.
// The bias is -infinity behind the last position, so that no loop over keys asks where it ends.
#pragma once
#include "common/octets.cuh"
#include "dnl_layer/states.cuh"

namespace dnl {

template <class T>
struct LayerTensorCores {
  static constexpr int kSteps = kLayerWidth / 16;  // tiles across a head
  using Operand = uint32_t[kSteps][4];
  using HeadSums = float[kSteps][2][4];

  // A head's projections: query, key [outputs, width], value alike, output [result, values]; padded with zeros.
  struct Weights {
    Octets<T> query, key, value, output;
    const float *query_bias, *key_bias, *value_bias;
  };

  template <class Body>
  DNL_DEVICE static void for_each_block(const LayerSizes& s, Body body) {
#pragma unroll 1
    for (int n = threadIdx.x / 32 * 16; n < s.columns; n += blockDim.x / 32 * 16) body(n);
  }

  // ---- products of rows of floats ----
  // d[n, c] += sum_r rows_r[position + n] w[r, column + c], or w[column + c, r] with kTransposed.
  template <bool kTransposed>
  DNL_DEVICE static void project(TileSums& d, const LayerSizes& s, const float* rows, int count, int position,
                                 const Octets<T>& w, int column) {
#pragma unroll 1
    for (int r = 0; r < count; r += 16) {
      uint32_t a[4], b[4];
      left_of_positions<T>(a, rows, s.stride, position, r, count);
      if constexpr (kTransposed) w.right_transposed(b, column, r);
      else w.right(b, r, column);
      multiply<T>(d, a, b);
    }
  }

  // row_r[position + n] += sum_d a[n, d] w[d, r], or w[r, d] with kTransposed, over `width` numbers d.
  template <bool kTransposed, int kCount>
  DNL_DEVICE static void spread(const LayerSizes& s, float* rows, int count, int position, const uint32_t (&a)[kCount][4],
                                int width, const Octets<T>& w) {
#pragma unroll 1
    for (int r = 0; r < count; r += 16) {
      TileSums d = {};
#pragma unroll
      for (int i = 0; i < kCount; i++)
        if (i * 16 < width) {
          uint32_t b[4];
          if constexpr (kTransposed) w.right_transposed(b, r, i * 16);
          else w.right(b, i * 16, r);
          multiply<T>(d, a[i], b);
        }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = r + tile_column(i / 4, i % 4), n = position + tile_row(i % 4);
        if (row < count && n < s.positions) rows[row * s.stride + n] += d[i / 4][i % 4];
      }
    }
  }

  // ---- accumulation ----
  template <class Params>
  DNL_DEVICE static void accumulate(const Params& p, float* y, float* operand, float* weights) {
    const LayerSizes& s = p.sizes;
    DNL_SHARED(LayerChannel<T>, table, 2 * kLayerChunk);
    LayerChunks<T, kLayerChunk> chunks(table, reinterpret_cast<T*>(weights));
    const Octets<T> activated{reinterpret_cast<T*>(operand), s.columns};
    begin_accumulation<T>(p, y);
    for (int begin = 0; begin < s.channels + s.skip; begin += kLayerChunk) {
      chunks.stage(p, begin);
      const Octets<T> filters{const_cast<T*>(chunks.filters), s.width_padded};
      for_each_block(s, [&](int position) {
        float x[8];
        load_octet(x, chunks, s, position);
        put_activated(activated, x, chunks, s, position, true);
        __syncwarp();
        uint32_t a[1][4];
        activated.left(a[0], position, 0);
        spread<true>(s, y, s.width, position, a, 16, filters);
      });
    }
  }

  // A lane's part of a chunk: 8 channels, from 8 (lane / 16) on, of position lane % 16.
  DNL_DEVICE static int my_octet() { return threadIdx.x % 32 / 16 * 8; }
  DNL_DEVICE static int my_position(int block) { return block + threadIdx.x % 16; }

  DNL_DEVICE static void load_octet(float (&x)[8], const LayerChunks<T, kLayerChunk>& chunks, const LayerSizes& s,
                                    int block) {
    if (my_position(block) < s.positions) chunks.load(x, my_position(block), my_octet());
    else
      for (float& v : x) v = 0;
  }

  // The operand that those are: normalised, activated, times the step where `scaled`; zeros behind the last position.
  DNL_DEVICE static void put_activated(const Octets<T>& to, const float (&x)[8],
                                       const LayerChunks<T, kLayerChunk>& chunks, const LayerSizes& s, int block,
                                       bool scaled) {
    const bool inside = my_position(block) < s.positions;
    Pack<T, 8> pack;
#pragma unroll
    for (int u = 0; u < 8; u++) {
      const LayerChannel<T>& c = chunks.channels[my_octet() + u];
      float value = x[u];
      if (!c.plain) value = (scaled ? c.factor : 1.0f) * activate(s.input_activation, c.scale * value + c.shift);
      pack.values[u] = from_float<T>(inside ? value : 0.0f);
    }
    *reinterpret_cast<Pack<T, 8>*>(to.at(my_position(block), my_octet())) = pack;
  }

  // ---- a head ----
  template <class Params>
  DNL_DEVICE static Weights stage_head(const Params& p, int head, float* memory) {
    const LayerSizes& s = p.sizes;
    T* to = reinterpret_cast<T*>(memory);
    // Rows [first, first + rows) of a matrix [.., columns] in global memory, columns [begin, begin + count).
    const auto matrix = [&](LayerParameter which, int64_t first, int rows, int padded, int columns, int begin, int count,
                            int count_padded) {
      const Octets<T> m{to, padded};
      for (int i = threadIdx.x; i < padded * count_padded; i += blockDim.x) {
        const int row = i / count_padded, column = i % count_padded;
        *m.at(row, column) = row < rows && column < count
                                 ? load_global(static_cast<const T*>(p.parameters[which]) + (first + row) * columns +
                                               begin + column)
                                 : from_float<T>(0.0f);
      }
      to += padded * count_padded;
      return m;
    };
    const auto projection = [&](LayerParameter which, int width, int padded) {
      return matrix(which, static_cast<int64_t>(head) * width, width, padded, s.width, 0, s.width, s.width_padded);
    };
    Weights w;
    w.query = projection(kQueryWeight, s.query, s.query_padded);
    const bool shared = s.kernel == LayerKernel::gaussian;
    w.key = shared ? w.query : projection(kKeyWeight, s.query, s.query_padded);
    w.value = projection(kValueWeight, s.value, s.value_padded);
    w.output = matrix(kOutputWeight, 0, s.result, s.result_padded, s.heads * s.value, head * s.value, s.value,
                      s.value_padded);
    float* biases = reinterpret_cast<float*>(to);
    const auto bias = [&](LayerParameter which, int width, int padded) {
      for (int d = threadIdx.x; d < padded; d += blockDim.x)
        biases[d] = d < width ? parameter<T>(p.parameters[which], static_cast<int64_t>(head) * width + d, 0) : 0.0f;
      biases += padded;
      return biases - padded;
    };
    w.query_bias = bias(kQueryBias, s.query, s.query_padded);
    w.key_bias = shared ? w.query_bias : bias(kKeyBias, s.query, s.query_padded);
    w.value_bias = bias(kValueBias, s.value, s.value_padded);
    return w;
  }

  // A tile of a projection of y with its bias.
  DNL_DEVICE static void project_biased(TileSums& d, const LayerSizes& s, const float* y, int position,
                                        const Octets<T>& w, const float* bias, int column) {
#pragma unroll
    for (int i = 0; i < 8; i++) d[i / 4][i % 4] = bias[column + tile_column(i / 4, i % 4)];
    project<true>(d, s, y, s.width, position, w, column);
  }

  DNL_DEVICE static void project_all(const LayerSizes& s, const Octets<T>& to, const float* y, const Octets<T>& w,
                                     const float* bias, int width) {
    for_each_block(s, [&](int position) {
#pragma unroll 1
      for (int column = 0; column < width; column += 16) {
        TileSums d;
        project_biased(d, s, y, position, w, bias, column);
        to.put(position, column, d, s.positions);
      }
    });
  }

  DNL_DEVICE static float alpha_of(const LayerSizes& s, float factor) {
    return s.kernel == LayerKernel::gaussian ? -2.0f * factor : factor;
  }

  // What is added to the scores of each key.
  DNL_DEVICE static void find_biases(const LayerSizes& s, float* bias, const Octets<T>& k, float factor) {
    __syncwarp();
    for_each_block(s, [&](int position) {
      if (threadIdx.x % 32 >= 16) return;
      const int n = my_position(position);
      float square = 0;
      if (s.kernel == LayerKernel::gaussian)
        for (int d = 0; d < s.query_padded; d += 2) {
          const float2 x = k.pair(n, d);
          square += x.x * x.x + x.y * x.y;
        }
      bias[n] = n < s.positions ? factor * square : s.kernel == LayerKernel::dot ? 0.0f : -INFINITY;
    });
  }

  DNL_DEVICE static void load_left(Operand& a, const Octets<T>& m, int position, int width) {
#pragma unroll
    for (int i = 0; i < kSteps; i++)
      if (i * 16 < width) m.left(a[i], position, i * 16);
  }

  // d[i, j] = own_i . other_j for the others from `first` on.
  DNL_DEVICE static void products(TileSums& d, const Operand& own, const Octets<T>& other, int first, int width) {
    clear(d);
#pragma unroll
    for (int i = 0; i < kSteps; i++)
      if (i * 16 < width) {
        uint32_t b[4];
        other.right_transposed(b, first, i * 16);
        multiply<T>(d, own[i], b);
      }
  }

  // sums[i, d] += sum_j w[i, j] m[first + j, d].
  DNL_DEVICE static void add_weighted(HeadSums& sums, const uint32_t (&w)[4], const Octets<T>& m, int first, int width) {
#pragma unroll
    for (int i = 0; i < kSteps; i++)
      if (i * 16 < width) {
        uint32_t b[4];
        m.right(b, first, i * 16);
        multiply<T>(sums[i], w, b);
      }
  }

  // Over the four lanes that share a row of a tile.
  DNL_DEVICE static float row_sum(float v) {
    v += __shfl_xor_sync(kFullWarp, v, 1);
    return v + __shfl_xor_sync(kFullWarp, v, 2);
  }
  DNL_DEVICE static float row_maximum(float v) {
    v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));
    return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
  }

  // o = sum_j w_j v_j / Z for 16 queries, and what makes exp2(score + shift) their w / Z (dot: 0). Two passes over the
  // keys: the first one's products cost less than changing the sums whenever the maximum does.
  DNL_DEVICE static void attend(HeadSums& o, float (&shift)[2], const LayerSizes& s, const Operand& q, const Octets<T>& k,
                                const Octets<T>& v, const float* bias, float alpha) {
    const bool exponential = s.kernel != LayerKernel::dot;
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    if (exponential) {
#pragma unroll 1
      for (int first = 0; first < s.columns; first += 16) {
        TileSums w;
        products(w, q, k, first, s.query_padded);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float score = alpha * w[i / 4][i % 4] + bias[first + tile_column(i / 4, i % 4)];
          highest[i % 4 / 2] = fmaxf(highest[i % 4 / 2], score);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) highest[r] = row_maximum(highest[r]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++) clear(o[i]);
#pragma unroll 1
    for (int first = 0; first < s.columns; first += 16) {
      TileSums w;
      products(w, q, k, first, s.query_padded);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& value = w[i / 4][i % 4];
        value *= alpha;
        if (exponential) value = exp2f(value + bias[first + tile_column(i / 4, i % 4)] - highest[i % 4 / 2]);
        total[i % 4 / 2] += value;
      }
      uint32_t a[4];
      as_left<T>(a, w);
      add_weighted(o, a, v, first, s.value_padded);
    }
    shift[0] = shift[1] = 0;
    if (!exponential) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] = row_sum(total[r]);
      shift[r] = -highest[r] - log2f(total[r]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) o[i][e / 4][e % 4] *= 1.0f / total[e % 4 / 2];
  }

  // A head's part of z = W_o concat_heads(..), without its bias.
  DNL_DEVICE static void attend_head(const LayerSizes& s, const Weights& w, const float* y, float* z, float* k_memory,
                                     float* v_memory, float* bias, float factor) {
    const Octets<T> k{reinterpret_cast<T*>(k_memory), s.columns}, v{reinterpret_cast<T*>(v_memory), s.columns};
    project_all(s, k, y, w.key, w.key_bias, s.query_padded);
    project_all(s, v, y, w.value, w.value_bias, s.value_padded);
    find_biases(s, bias, k, factor);
    __syncthreads();
    for_each_block(s, [&](int position) {
      Operand a;
      if (s.kernel == LayerKernel::gaussian) {
        load_left(a, k, position, s.query_padded);
      } else {
#pragma unroll
        for (int i = 0; i < kSteps; i++)
          if (i * 16 < s.query_padded) {
            TileSums q;
            project_biased(q, s, y, position, w.query, w.query_bias, i * 16);
            as_left<T>(a[i], q);
          }
      }
      HeadSums o;
      float shift[2];
      attend(o, shift, s, a, k, v, bias, alpha_of(s, factor));
#pragma unroll
      for (int i = 0; i < kSteps; i++) as_left<T>(a[i], o[i]);
      spread<true>(s, z, s.result, position, a, s.value_padded, w.output);
    });
    __syncthreads();
  }
};

}  // namespace dnl
