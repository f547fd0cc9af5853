// Backward of nonlocal_attention in one pass over the tiles, five products for each pair: weights and their gradients
// are formed with lanes over queries (which gives dq), stored for a block of keys, and multiplied with the queries' and
// doutput's rows with lanes over features (which gives dk and dv). Weights are recomputed from the rows' shift and sum.
#include "nonlocal_attention/tiles.h"

namespace dnl::DNL_ISA {
namespace {

// A block is a few tiles of queries against kBlockKeys keys (whole groups for every vector length): its five products
// have their sums in registers over a side of it, and what they exchange stays in cache.
constexpr int64_t kTiles = 4, kBlockKeys = 96;
template <class T>
constexpr int kBlockQueries = kTiles * kQueries<T>;

template <class T>
using HalfVec = typename VecOf<T, DNL_VECTOR_BYTES / 2>::type;
// Rows with lanes over features are padded to half a vector.
template <class T>
DNL_INLINE int64_t padded_width(int64_t width) {
  return round_up(width, kLanes<T> / 2);
}

// out[u][f...] += sum_{first <= i < last} s[u][i] * rows[i][f...] for kRows keys and kCount vectors of features, where
// first < last; summed before it is added, as in accumulate_features.
template <class V, int kRows, int kCount, class T>
void rank_update(T* out, const T* s, const T* rows, int64_t width, int64_t first, int64_t last) {
  constexpr int kL = sizeof(V) / sizeof(T);
  V sum[kRows][kCount] = {};
  int64_t i = first;
  do {  // no loop without a turn, for which the compiler would keep the sums in memory as well
    V r[kCount];
#pragma GCC unroll 2
    for (int c = 0; c < kCount; c++) memcpy(&r[c], rows + i * width + c * kL, sizeof(V));
#pragma GCC unroll 16
    for (int u = 0; u < kRows; u++) {
      const V x = s[u * kBlockQueries<T> + i] - V{};
#pragma GCC unroll 2
      for (int c = 0; c < kCount; c++) sum[u][c] += x * r[c];
    }
  } while (++i < last);
#pragma GCC unroll 16
  for (int u = 0; u < kRows; u++)
#pragma GCC unroll 2
    for (int c = 0; c < kCount; c++) {
      V before;
      memcpy(&before, out + u * width + c * kL, sizeof(V));
      before += sum[u][c];
      memcpy(out + u * width + c * kL, &before, sizeof(V));
    }
}

// The same for `keys` keys, a multiple of kRows: twice as many at a time with a single vector of features, so that as
// many sums are independent of each other.
template <class V, int kRows, int kCount, class T>
DNL_INLINE void rank_update_keys(T* out, const T* s, const T* rows, int64_t width, int64_t keys, int64_t first,
                                 int64_t last) {
  int64_t u = 0;
  if constexpr (kCount == 1)
    for (; u + 2 * kRows <= keys; u += 2 * kRows)
      rank_update<V, 2 * kRows, 1>(out + u * width, s + u * kBlockQueries<T>, rows, width, first, last);
  for (; u < keys; u += kRows)
    rank_update<V, kRows, kCount>(out + u * width, s + u * kBlockQueries<T>, rows, width, first, last);
}

// The same for all features.
template <int kRows, class T>
void rank_updates(T* out, const T* s, const T* rows, int64_t width, int64_t keys, int64_t first, int64_t last) {
  constexpr int kL = kLanes<T>;
  int64_t f = 0;
  for (; f + 2 * kL <= width; f += 2 * kL)
    rank_update_keys<Vec<T>, kRows, 2>(out + f, s, rows + f, width, keys, first, last);
  if (f + kL <= width) {
    rank_update_keys<Vec<T>, kRows, 1>(out + f, s, rows + f, width, keys, first, last);
    f += kL;
  }
  if (f < width) rank_update_keys<HalfVec<T>, kRows, 1>(out + f, s, rows + f, width, keys, first, last);
}

// What one thread works with: packed keys of its part, the block's queries and doutput both ways, and the gradients.
template <class T>
struct Workspace {
  int64_t D, E, Dp, Ep, padded;
  Buffer<T> keys, values, bias, dk, dv, column;  // of the part; column: [padded][lanes] sums of delta
  Buffer<T> q, g, dq, q_rows, g_rows;            // of the block: [tile][features][kQueries], [query][features]
  Buffer<T> weight, delta;                       // of the block: [kBlockKeys][kBlockQueries]
  Buffer<T> o, anchor;                           // of a tile

  Workspace(const NonlocalParams& p)
      : D(p.width), E(p.value_width), Dp(padded_width<T>(D)), Ep(padded_width<T>(E)),
        padded(round_up(p.part_keys, kKeys)), keys(padded * D), values(padded * E), bias(padded), dk(padded * Dp),
        dv(padded * Ep), column(padded * kLanes<T>), q(D * kBlockQueries<T>), g(E * kBlockQueries<T>),
        dq(D * kBlockQueries<T>), q_rows(Dp * kBlockQueries<T>), g_rows(Ep * kBlockQueries<T>),
        weight(kBlockKeys * kBlockQueries<T>), delta(kBlockKeys * kBlockQueries<T>), o(E * kQueries<T>),
        anchor(p.anchor.data ? D * kQueries<T> : 0) {}
};

template <class T>
struct Tile {
  Pair<T> shift;   // of the exponents
  Pair<T> drift;   // sum_j w_ij (doutput_i . v_j), times 1 / sum_i as doutput is
  Pair<T> row;     // sum_j delta_ij
  Pair<T> moment;  // sum_j delta_ij s_ij
  Pair<T> mean;    // sum_j w_ij s_ij
  Pair<T> near;    // 1 where dq_i of a Gaussian is anchored to q_i, else 0
  int64_t count;
  bool bounded, anchored;
};

// Of a tile's scores and doutput . value, in w.weight and w.delta, makes weight = 2^(score - shift) and delta = weight
// (doutput . value - drift), and sums. kBounded: the rows have no shift, and no exponent is large.
template <Score kScore, bool kBounded, Mask kMask, bool kMoment, class T>
DNL_INLINE void form_deltas(Workspace<T>& w, Tile<T>& t, const Limits<T>& limit, int64_t at, int64_t j, int64_t keys) {
  const Pair<T> shift = t.shift, drift = t.drift;
  Pair<T> row = t.row, moment = t.moment, mean = t.mean;
  for (int64_t u = 0; u < keys; u++) {
    T* const weights = w.weight + u * kBlockQueries<T> + at * kQueries<T>;
    T* const deltas = w.delta + u * kBlockQueries<T> + at * kQueries<T>;
    Pair<T> s = load_pair(weights), d = load_pair(deltas);
    if constexpr (!kBounded) s = {s.a - shift.a, s.b - shift.b};
    const Pair<T> weight = exp2_pair<kBounded>(s);
    d.a = limit.template allow<kMask>(j + u, 0, (d.a - drift.a) * weight.a);
    d.b = limit.template allow<kMask>(j + u, 1, (d.b - drift.b) * weight.b);
    store_pair(weights, weight);
    store_pair(deltas, d);
    if constexpr (kScore != Score::dot) {
      T* column = w.column + (j + u) * kLanes<T>;
      store(column, load(column) + (d.a + d.b));
    }
    if constexpr (kScore != Score::dot || !kBounded) row = {row.a + d.a, row.b + d.b};
    if constexpr (kMoment) {
      s = {maximum(s.a, lowest<T>()), maximum(s.b, lowest<T>())};  // finite: 0 * lowest is 0
      moment = {moment.a + d.a * s.a, moment.b + d.b * s.b};       // a masked delta is zero
      mean.a += limit.template allow<kMask>(j + u, 0, weight.a * s.a);
      mean.b += limit.template allow<kMask>(j + u, 1, weight.b * s.b);
    }
  }
  t.row = row, t.moment = moment, t.mean = mean;
}

// Whole groups of `keys` <= kBlockKeys keys from j on, against the block's tiles; where the mask is ragged, one group
// against one tile.
template <Score kScore, bool kBounded, Mask kMask, bool kMoment, class T>
void add_keys(Workspace<T>& w, Tile<T>* tiles, int64_t count, const Limits<T>& limit, int64_t j, int64_t keys) {
  constexpr int kQ = kQueries<T>, kRow = kBlockQueries<T>;
  for (int64_t at = 0; at * kQ < count; at++)
    store_scores<kScore, kRow, T>(w.weight + at * kQ, w.q + at * kQ * w.D, w.keys + j * w.D, w.bias + j, w.D, keys);
  for (int64_t at = 0; at * kQ < count; at++)
    store_scores<Score::dot, kRow, T>(w.delta + at * kQ, w.g + at * kQ * w.E, w.values + j * w.E, nullptr, w.E, keys);
  for (int64_t at = 0; at * kQ < count; at++)
    form_deltas<kScore, kBounded, kMask, kMoment>(w, tiles[at], limit, at, j, keys);
  T *dk = w.dk + j * w.Dp, *dv = w.dv + j * w.Ep;
  if constexpr (kMask != Mask::ragged) {
    for (int64_t at = 0; at * kQ < count; at++)
      accumulate<kRow, T>(w.dq + at * kQ * w.D, w.keys + j * w.D, w.D, w.delta + at * kQ, keys);
    rank_updates<kKeys, T>(dv, w.weight, w.g_rows, w.Ep, keys, 0, count);
    rank_updates<kKeys, T>(dk, w.delta, w.q_rows, w.Dp, keys, 0, count);
  } else {
    accumulate_ragged<kRow, T>(w.dq, w.keys + j * w.D, w.D, w.delta, limit, j);
    for (int u = 0; u < kKeys; u++) {
      int64_t i = 0;  // limits grow with the query: the first one that sees the key
      while (i < count && limit.of[i] <= T(j + u)) i++;
      if (i == count) continue;
      rank_updates<1, T>(dv + u * w.Ep, w.weight + u * kBlockQueries<T>, w.g_rows, w.Ep, 1, i, count);
      rank_updates<1, T>(dk + u * w.Dp, w.delta + u * kBlockQueries<T>, w.q_rows, w.Dp, 1, i, count);
    }
  }
}

template <Score kScore, bool kBounded, bool kMoment, class T>
void add_blocks(Workspace<T>& w, Tile<T>* tiles, int64_t count, const Limits<T>& limit) {
  for_key_blocks(limit, kBlockKeys, [&]<Mask kMask>(int64_t j, int64_t keys) {
    add_keys<kScore, kBounded, kMask, kMoment>(w, tiles, count, limit, j, keys);
  });
}

// rows[i][f] = lanes[f][i], padded with zeros.
template <class T>
void lanes_to_rows(const T* lanes, int64_t width, int64_t padded, int64_t count, T* rows) {
  transpose_block<false, T>(lanes, kQueries<T>, width, count, rows, padded);
  for (int64_t i = 0; i < count && width < padded; i++)
    for (int64_t f = width; f < padded; f++) rows[i * padded + f] = 0;
}

// Packs tile `at` of a block: queries, doutput over the row's sum, and the drift.
template <class T>
Tile<T> pack_tile(const NonlocalParams& p, Workspace<T>& w, const Scales<T>& scale, const T* centre, int64_t b,
                  int64_t h, int64_t at, int64_t first, int64_t count) {
  constexpr int kQ = kQueries<T>;
  T *const q = w.q + at * kQ * w.D, *const g = w.g + at * kQ * w.E;
  const int64_t row = (b * p.heads + h) * p.queries + first;
  alignas(64) T shift[kQ] = {}, inverse[kQ] = {}, near[kQ];
  read_lanes<T>(p, p.query, b, h, nullptr, first, count, w.D, q);
  finish_queries<T>(scale, query_centre(p, centre), count, w.D, q);
  read_lanes<T>(p, p.doutput, b, h, nullptr, first, count, w.E, g);
  for (int64_t i = 0; i < count; i++) {
    const T sum = static_cast<const T*>(p.sum)[row + i];
    shift[i] = static_cast<const T*>(p.shift)[row + i];
    inverse[i] = sum == 0 ? T(0) : 1 / sum;
  }
  scale_rows<T>(g, w.E, load_pair(inverse));
  Tile<T> tile{};
  if (p.normalize) {
    read_lanes<T>(p, p.output, b, h, nullptr, first, count, w.E, w.o);
    for (int64_t e = 0; e < w.E; e++) {
      const Pair<T> x = load_pair(g + e * kQ), y = load_pair(w.o + e * kQ);
      tile.drift.a += x.a * y.a;
      tile.drift.b += x.b * y.b;
    }
  }
  lanes_to_rows<T>(q, w.D, w.Dp, count, w.q_rows + at * kQ * w.Dp);
  lanes_to_rows<T>(g, w.E, w.Ep, count, w.g_rows + at * kQ * w.Ep);
  memset(w.dq + at * kQ * w.D, 0, w.D * kQ * sizeof(T));
  tile.shift = load_pair(shift);
  tile.count = count;
  tile.bounded = p.normalize && safe_exponents<T>(p, scale, q, static_cast<const T*>(p.radius)[b * p.heads + h]);
  for (int i = 0; i < kQ; i++) tile.bounded = tile.bounded && shift[i] == 0;
  tile.anchored = p.anchor.data && !tile.bounded && anchored<T>(p, b * p.heads + h, first, count);
  // Unnormalised, sum_j delta_ij is no error and q_i belongs there. Else q_i is nearer to the keys that matter than their
  // centre is where the keys' mean weight is above 1 with the centre's: log2(sum_i / M) + shift_i > 0.
  for (int64_t i = 0; i < kQ; i++)
    near[i] = !p.normalize || (!tile.anchored && shift[i] > T(log2(double(p.keys) * inverse[i])));
  tile.near = load_pair(near);
  return tile;
}

template <class T>
void write_dquery(const NonlocalParams& p, Workspace<T>& w, const Scales<T>& scale, const T* centre, const Tile<T>& tile,
                  int64_t part, int64_t b, int64_t h, int64_t at, int64_t first) {
  constexpr int kQ = kQueries<T>;
  T *const q = w.q + at * kQ * w.D, *const dq = w.dq + at * kQ * w.D;
  if (tile.anchored) read_lanes<T>(p, p.anchor, b, h, nullptr, first, tile.count, w.D, w.anchor);
  const Pair<T> row = tile.row, near{row.a * tile.near.a, row.b * tile.near.b};
  for (int64_t d = 0; d < w.D; d++) {
    Pair<T> x = load_pair(dq + d * kQ);
    if (tile.anchored) {
      const Pair<T> anchor = load_pair(w.anchor + d * kQ);
      const Vec<T> c = broadcast(centre ? centre[d] : T(0));
      x.a -= row.a * (anchor.a - c);
      x.b -= row.b * (anchor.b - c);
    }
    const Vec<T> of_sum = broadcast(scale.dquery), of_row = broadcast(scale.dquery_row);
    const Pair<T> own = load_pair(q + d * kQ);
    x = {x.a * of_sum, x.b * of_sum};
    if (scale.dquery_row != 0) x = {x.a - of_row * near.a * own.a, x.b - of_row * near.b * own.b};
    store_pair(dq + d * kQ, x);
  }
  if (p.parts == 1) return write_lanes<T>(p, p.dquery, b, h, nullptr, first, tile.count, w.D, dq);
  T* to = static_cast<T*>(p.dquery_parts) +
          (((part * p.batch + b) * p.heads + h) * p.queries + first) * w.D;
  transpose_block<false, T>(dq, kQ, w.D, tile.count, to, w.D);
}

template <class T>
void write_part(const NonlocalParams& p, Workspace<T>& w, const Scales<T>& scale, int64_t b, int64_t h, int64_t first,
                int64_t count) {
  for (int64_t j = 0; j < count; j++) {
    T* dk = w.dk + j * w.Dp;
    const T* k = w.keys + j / kKeys * kKeys * w.D + j % kKeys;
    const T column = scale.dkey_column == 0 ? T(0) : scale.dkey_column * sum_lanes<T>(load(w.column + j * kLanes<T>));
    for (int64_t d = 0; d < w.D; d++) {
      dk[d] *= scale.dkey;
      if (scale.dkey_column != 0) dk[d] -= column * k[d * kKeys];
    }
  }
  const int64_t* index = p.key_index ? p.key_index + b * p.keys + first : nullptr;
  for (int64_t j = 0; j < count; j += kQueries<T>) {
    const int64_t n = smaller(kQueries<T>, count - j);
    const int64_t* at = index ? index + j : nullptr;
    transpose_block<true, T>(w.dk + j * w.Dp, w.Dp, n, w.D, w.q, kQueries<T>);
    write_lanes<T>(p, p.dkey, b, h, at, first + j, n, w.D, w.q);
    transpose_block<true, T>(w.dv + j * w.Ep, w.Ep, n, w.E, w.g, kQueries<T>);
    write_lanes<T>(p, p.dvalue, b, h, at, first + j, n, w.E, w.g);
  }
}

// The three sums of each row, from which the caller forms sum_ij delta_ij (s_ij - a_i) with the row's mean exponent as a_i:
// any a_i does, as the deltas of a normalised row sum to zero, but for the error of the drift, which all of them share.
template <class T>
void write_moments(const NonlocalParams& p, const Tile<T>& tile, int64_t part, int64_t bh, int64_t first) {
  constexpr int kQ = kQueries<T>;
  T row[kQ], moment[kQ], mean[kQ];
  store_pair(row, tile.row);
  store_pair(moment, tile.moment);
  store_pair(mean, tile.mean);
  T* to = static_cast<T*>(p.moments) + 3 * ((part * p.batch * p.heads + bh) * p.queries + first);
  for (int64_t i = 0; i < tile.count; i++, to += 3) to[0] = row[i], to[1] = moment[i], to[2] = mean[i];
}

template <Score kScore, bool kMoment, class T>
void run_parts(const NonlocalParams& p, int64_t begin, int64_t end) {
  constexpr int kQ = kQueries<T>;
  const int64_t block = p.causal ? kQ : kBlockQueries<T>;  // queries that all see the same keys, but for causality
  Workspace<T> w(p);
  for (int64_t task = begin; task < end; task++) {
    const int64_t part = task % p.parts, bh = task / p.parts, b = bh / p.heads, h = bh % p.heads;
    const int64_t first = part * p.part_keys;
    const int64_t count = larger(0, smaller(allowed_keys(p, b) - first, p.part_keys));
    const T* centre = centre_of<T>(p, b, h);
    const Scales<T> scale = scales<T>(p, kScore, h);
    pack_panels<T>(p, p.key, b, h, first, count, w.D, w.keys, w.q);
    if (centre) finish_keys<T>(scale, centre, count, w.D, w.keys, w.bias);
    pack_panels<T>(p, p.value, b, h, first, count, w.E, w.values, w.g);
    const int64_t rows = round_up(count, kKeys);
    memset(w.dk, 0, rows * w.Dp * sizeof(T));
    memset(w.dv, 0, rows * w.Ep * sizeof(T));
    memset(w.column, 0, rows * kLanes<T> * sizeof(T));
    for (int64_t query = 0; query < p.queries; query += block) {
      const int64_t n = smaller(block, p.queries - query);
      const Limits<T> limit = limits<T>(p, b, query, smaller(kQ, n), first, count);
      Tile<T> tiles[kTiles];
      bool bounded = kScore != Score::distance;
      for (int64_t at = 0, i = 0; i < n; at++, i += kQ) {
        tiles[at] = pack_tile<T>(p, w, scale, centre, b, h, at, query + i, smaller(kQ, n - i));
        bounded = bounded && tiles[at].bounded;
      }
      if (bounded) add_blocks<kScore, kScore != Score::distance, kMoment>(w, tiles, n, limit);
      else add_blocks<kScore, false, kMoment>(w, tiles, n, limit);
      for (int64_t at = 0, i = 0; i < n; at++, i += kQ) {
        write_dquery(p, w, scale, centre, tiles[at], part, b, h, at, query + i);
        if constexpr (kMoment) write_moments(p, tiles[at], part, bh, query + i);
      }
    }
    write_part(p, w, scale, b, h, first, count);
  }
}

}  // namespace

template <class T>
void nonlocal_bwd(const NonlocalParams& p, int64_t begin, int64_t end) {
  with_score(p, [&]<Score kScore>() {
    if (kScore != Score::dot && p.moments) run_parts<kScore, kScore != Score::dot, T>(p, begin, end);
    else run_parts<kScore, false, T>(p, begin, end);
  });
}

template <class T>
void nonlocal_sum_parts(const NonlocalParams& p, int64_t begin, int64_t end) {
  constexpr int kQ = kQueries<T>;
  const int64_t D = p.width, N = p.queries, stride = p.batch * p.heads * N * D, tiles = (N + kQ - 1) / kQ;
  Buffer<T> sum(kQ * D), lanes(kQ * D);
  for (int64_t task = begin; task < end; task++) {
    const int64_t bh = task / tiles, first = task % tiles * kQ, n = smaller(kQ, N - first);
    const T* from = static_cast<const T*>(p.dquery_parts) + (bh * N + first) * D;
    memcpy(sum, from, n * D * sizeof(T));
    for (int64_t part = 1; part < p.parts; part++)
      for (int64_t i = 0; i < n * D; i++) sum[i] += from[part * stride + i];
    transpose_block<true, T>(sum, D, n, D, lanes, kQ);
    write_lanes<T>(p, p.dquery, bh / p.heads, bh % p.heads, nullptr, first, n, D, lanes);
  }
}

#define DNL_INSTANTIATE(T)                                                      \
  template void nonlocal_bwd<T>(const NonlocalParams&, int64_t, int64_t);       \
  template void nonlocal_sum_parts<T>(const NonlocalParams&, int64_t, int64_t);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
