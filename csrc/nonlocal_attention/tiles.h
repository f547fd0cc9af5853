// What the forward and the backward share: packing, and the two products of a tile.
//
// Vector lanes run over queries. A tile is kQueries queries (two vectors) against groups of kKeys keys, whose
// kKeys x 2 scores stay in registers. Keys and values are packed in panels [group][feature][kKeys], of which every
// number is broadcast; queries in [feature][kQueries].
#pragma once
#include <math.h>
#include <new>

#include "common/math.h"
#include "nonlocal_attention/params.h"

namespace dnl::DNL_ISA {
namespace {

// As many as leave registers for two vectors of queries and a broadcast, of 32 (AVX-512) or 16.
constexpr int kKeys = DNL_VECTOR_BYTES == 64 ? 8 : DNL_VECTOR_BYTES == 32 ? 6 : 4;
template <class T>
constexpr int kQueries = 2 * kLanes<T>;
// Where all exponents of a tile provably lie within +-kSafeRange, they need no shift: nothing over- or underflows.
constexpr int kSafeRange = 32;

// How a score is formed: q.k, q.k + bias (a normalised Gaussian), -|q - k|^2 (an unnormalised one, exact at any scale).
enum class Score { dot, dot_bias, distance };

template <class T>
struct Pair {
  Vec<T> a, b;
};
template <class T>
DNL_INLINE Pair<T> load_pair(const T* row) {
  return {load(row), load(row + kLanes<T>)};
}
template <class T>
DNL_INLINE void store_pair(T* row, Pair<T> x) {
  store(row, x.a);
  store(row + kLanes<T>, x.b);
}
template <bool kBounded, class T>
DNL_INLINE Pair<T> exp2_pair(Pair<T> x) {
  Vec<T> both[2] = {x.a, x.b};
  exp2<T, kBounded>(both);
  return {both[0], both[1]};
}
// rows[f] *= x, of [width][kQueries].
template <class T>
DNL_INLINE void scale_rows(T* rows, int64_t width, Pair<T> x) {
  for (T* end = rows + width * kQueries<T>; rows < end; rows += kQueries<T>)
    store_pair<T>(rows, {load(rows) * x.a, load(rows + kLanes<T>) * x.b});
}
// sum_f (rows[f] - centre[f])^2; without a centre, of the rows themselves.
template <class T>
DNL_INLINE Pair<T> squared_norms(const T* rows, const T* centre, int64_t width) {
  Pair<T> sum{};
  for (int64_t f = 0; f < width; f++) {
    const Pair<T> x = load_pair(rows + f * kQueries<T>);
    const Vec<T> c = broadcast(centre ? centre[f] : T(0));
    sum.a += (x.a - c) * (x.a - c);
    sum.b += (x.b - c) * (x.b - c);
  }
  return sum;
}
template <class T>
struct Scores {
  Vec<T> at[kKeys][2];
};

DNL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DNL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
DNL_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class T>
class Buffer {
 public:
  // A vector longer than asked for, since rows are read in whole vectors.
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(operator new(n * sizeof(T) + DNL_VECTOR_BYTES, std::align_val_t{64}))) {}
  ~Buffer() { operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// ---- Elements in memory --------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t b = __builtin_bit_cast(uint32_t, x);
    bits = x == x ? (b + 0x7fff + ((b >> 16) & 1)) >> 16 : 0x7fc0;  // to nearest, ties to even
  }
};

template <class Body>
DNL_INLINE void with_storage(Storage storage, void* data, Body body) {
  switch (storage) {
    case Storage::float32: return body(static_cast<float*>(data));
    case Storage::float64: return body(static_cast<double*>(data));
    case Storage::bfloat16: return body(static_cast<BFloat16*>(data));
    case Storage::float16: return body(static_cast<_Float16*>(data));
  }
}

// to[f][i] = from[i][f] for i < rows, f < width. Whole vectors are read from every row of `from`; where kRoom, they are
// also written to every row of `to`, with zeros from i = rows on.
template <bool kRoom, class T>
DNL_INLINE void transpose_block(const T* from, int64_t from_stride, int64_t rows, int64_t width, T* to,
                                int64_t to_stride) {
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < rows; i += kL)
    for (int64_t f = 0; f < width; f += kL) {
      const int64_t count = smaller(kL, rows - i), features = smaller(kL, width - f);
      Vec<T> block[kL];
      if (count == kL && features == kL) {
#pragma GCC unroll 16
        for (int r = 0; r < kL; r++) block[r] = load(from + (i + r) * from_stride + f);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int r = 0; r < kL; r++) store(to + (f + r) * to_stride + i, block[r]);
        continue;
      }
#pragma GCC unroll 16
      for (int r = 0; r < kL; r++) block[r] = r < count ? load(from + (i + r) * from_stride + f) : Vec<T>{};
      transpose<T>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kL; r++) {
        T* row = to + (f + r) * to_stride + i;
        if (r >= features) continue;
        if (kRoom || count == kL) store(row, block[r]);
        else store_partial(row, block[r], int(count));
      }
    }
}

// Asks for the rows that will be read next: in strips of features they are too far apart for the processor to foresee.
// Addresses behind the tensor do no harm.
template <class Element>
DNL_INLINE void prefetch_rows(const Element* from, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t f = 0; f < width; f += 64 / sizeof(Element)) __builtin_prefetch(from + i * stride + f);
}

// Up to kQueries positions of t into lanes [width][kQueries]: from `first` on, or those that `index` lists. The other
// lanes are zero.
template <class T>
void read_lanes(const NonlocalParams& p, const NonlocalTensor& t, int64_t b, int64_t h, const int64_t* index,
                int64_t first, int64_t count, int64_t width, T* lanes) {
  constexpr int kQ = kQueries<T>;
  const int64_t offset = b * t.batch + h * t.head;
  if (count < kQ) memset(lanes, 0, width * kQ * sizeof(T));
  with_storage(p.storage, t.data, [&]<class Element>(const Element* data) {
    const Element* from = data + offset;
    if (t.feature == 1) {
      if (!index) prefetch_rows(from + (first + count) * t.position, t.position, count, width);
      T rows[kQ * kLanes<T>];  // a strip of features
      for (int64_t f = 0; f < width; f += kLanes<T>) {
        const int64_t features = smaller(kLanes<T>, width - f);
        if constexpr (__is_same(Element, T))
          if (!index && features == kLanes<T>) {
            transpose_block<true, T>(from + first * t.position + f, t.position, count, features, lanes + f * kQ, kQ);
            continue;
          }
        for (int64_t i = 0; i < count; i++) {
          const Element* row = from + (index ? index[i] : first + i) * t.position + f;
          T* to = rows + i * kLanes<T>;
          if (features == kLanes<T>)
            for (int c = 0; c < kLanes<T>; c++) to[c] = T(row[c]);
          else
            for (int64_t c = 0; c < features; c++) to[c] = T(row[c]);
        }
        transpose_block<true, T>(rows, kLanes<T>, count, features, lanes + f * kQ, kQ);
      }
    } else {
      for (int64_t f = 0; f < width; f++) {
        const Element* column = from + f * t.feature;
        T* to = lanes + f * kQ;
        if (index)
          for (int64_t i = 0; i < count; i++) to[i] = T(column[index[i] * t.position]);
        else if (t.position == 1 && count == kQ)
          for (int i = 0; i < kQ; i++) to[i] = T(column[first + i]);
        else if (t.position == 1)
          for (int64_t i = 0; i < count; i++) to[i] = T(column[first + i]);
        else
          for (int64_t i = 0; i < count; i++) to[i] = T(column[(first + i) * t.position]);
      }
    }
  });
}

// The opposite of read_lanes.
template <class T>
void write_lanes(const NonlocalParams& p, const NonlocalTensor& t, int64_t b, int64_t h, const int64_t* index,
                 int64_t first, int64_t count, int64_t width, const T* lanes) {
  constexpr int kQ = kQueries<T>;
  const int64_t offset = b * t.batch + h * t.head;
  with_storage(p.storage, t.data, [&]<class Element>(Element* data) {
    Element* to = data + offset;
    if (t.feature == 1) {
      T rows[kQ * kLanes<T>];
      for (int64_t f = 0; f < width; f += kLanes<T>) {
        const int64_t features = smaller(kLanes<T>, width - f);
        if constexpr (__is_same(Element, T))
          if (!index && features == kLanes<T>) {
            transpose_block<true, T>(lanes + f * kQ, kQ, features, count, to + first * t.position + f, t.position);
            continue;
          }
        transpose_block<true, T>(lanes + f * kQ, kQ, features, count, rows, kLanes<T>);
        for (int64_t i = 0; i < count; i++) {
          Element* row = to + (index ? index[i] : first + i) * t.position + f;
          const T* values = rows + i * kLanes<T>;
          if (features == kLanes<T>)
            for (int c = 0; c < kLanes<T>; c++) row[c] = Element(values[c]);
          else
            for (int64_t c = 0; c < features; c++) row[c] = Element(values[c]);
        }
      }
    } else {
      for (int64_t f = 0; f < width; f++) {
        Element* column = to + f * t.feature;
        const T* from = lanes + f * kQ;
        if (index)
          for (int64_t i = 0; i < count; i++) column[index[i] * t.position] = Element(from[i]);
        else if (t.position == 1 && count == kQ)
          for (int i = 0; i < kQ; i++) column[first + i] = Element(from[i]);
        else if (t.position == 1)
          for (int64_t i = 0; i < count; i++) column[first + i] = Element(from[i]);
        else
          for (int64_t i = 0; i < count; i++) column[(first + i) * t.position] = Element(from[i]);
      }
    }
  });
}

// ---- Scales: everything that distinguishes the kernels in numbers --------------------------------------------------

// Packed queries and keys are (x - centre) times `query`, `key`, so that scores are exponents of 2. Gradients from the
// packed ones: dq_i = dquery * sum_j delta_ij k_j - dquery_row * q_i * sum_j delta_ij, and dk_j likewise.
template <class T>
struct Scales {
  T query, key, bias, dquery, dquery_row, dkey, dkey_column;
};

template <class T>
Scales<T> scales(const NonlocalParams& p, Score score, int64_t h) {
  if (score == Score::dot && p.bandwidth == nullptr)
    return {T(p.scale * kLog2E), 1, 0, T(p.scale), 0, T(1 / kLog2E), 0};
  const double precision = 1 / (p.bandwidth[h] * p.bandwidth[h]);
  if (score == Score::dot_bias)
    return {T(precision * kLog2E), 1, T(-0.5 * precision * kLog2E), T(precision), T(1 / kLog2E), T(1 / kLog2E), T(precision)};
  const double root = sqrt(0.5 * precision * kLog2E);
  const T d = T(precision / root);
  return {T(root), T(root), 0, d, d, d, d};
}

template <class Body>
DNL_INLINE void with_score(const NonlocalParams& p, Body body) {
  if (p.bandwidth == nullptr) return body.template operator()<Score::dot>();
  if (p.normalize) return body.template operator()<Score::dot_bias>();
  return body.template operator()<Score::distance>();
}

// ---- Packing -------------------------------------------------------------------------------------------------------

DNL_INLINE int64_t allowed_keys(const NonlocalParams& p, int64_t b) { return p.key_index ? p.key_count[b] : p.keys; }

template <class T>
DNL_INLINE const T* centre_of(const NonlocalParams& p, int64_t b, int64_t h) {
  return p.centre ? static_cast<const T*>(p.centre) + (b * p.heads + h) * p.width : nullptr;
}
// A product's rows shift as a whole when the keys alone move, and softmax does not see it; a distance needs both.
template <class T>
DNL_INLINE const T* query_centre(const NonlocalParams& p, const T* centre) {
  return p.bandwidth ? centre : nullptr;
}

// Calls body(j, n) after each n <= kQueries (whole groups, but for the last) of the allowed keys [first, first + count) of t, those from first + j on, have
// been read into `lanes`.
template <class T, class Body>
DNL_INLINE void for_key_lanes(const NonlocalParams& p, const NonlocalTensor& t, int64_t b, int64_t h, int64_t first,
                              int64_t count, int64_t width, T* lanes, Body body) {
  const int64_t* index = p.key_index ? p.key_index + b * p.keys + first : nullptr;
  constexpr int64_t kRead = kQueries<T> / kKeys * kKeys;
  for (int64_t j = 0; j < count; j += kRead) {
    const int64_t n = smaller(kRead, count - j);
    read_lanes<T>(p, t, b, h, index ? index + j : nullptr, first + j, n, width, lanes);
    body(j, n);
  }
}

// The allowed keys [first, first + count) of t into panels; what is left of the last group is zero. lanes: scratch.
template <class T>
void pack_panels(const NonlocalParams& p, const NonlocalTensor& t, int64_t b, int64_t h, int64_t first, int64_t count,
                 int64_t width, T* panels, T* lanes) {
  for_key_lanes<T>(p, t, b, h, first, count, width, lanes, [&](int64_t j, int64_t n) {
    for (int64_t u = 0; u < n; u += kKeys)
      for (int64_t f = 0; f < width; f++)
        memcpy(panels + (j + u) * width + f * kKeys, lanes + f * kQueries<T> + u, kKeys * sizeof(T));
  });
}

// Centres and scales packed keys; bias[j] = scales.bias * |k_j|^2.
template <class T>
void finish_keys(const Scales<T>& scale, const T* centre, int64_t count, int64_t width, T* panels, T* bias) {
  for (int64_t j = 0; j < count; j += kKeys) {
    T norm[kKeys] = {};
    for (int64_t d = 0; d < width; d++) {
      T* k = panels + j * width + d * kKeys;
      for (int u = 0; u < kKeys; u++) {
        k[u] = (k[u] - centre[d]) * scale.key;
        norm[u] += k[u] * k[u];
      }
    }
    for (int u = 0; u < kKeys; u++) bias[j + u] = scale.bias * norm[u];
  }
}

// Centres and scales queries in lanes; lanes without a query stay zero.
template <class T>
DNL_INLINE void finish_queries(const Scales<T>& scale, const T* centre, int64_t count, int64_t width, T* lanes) {
  constexpr int kQ = kQueries<T>;
  for (int64_t f = 0; f < width; f++) {
    const T c = centre ? centre[f] : T(0);
    for (int64_t i = 0; i < kQ; i++) lanes[f * kQ + i] = i < count ? (lanes[f * kQ + i] - c) * scale.query : T(0);
  }
}

// ---- Which keys a query sees ---------------------------------------------------------------------------------------

// Query i of a tile sees the first `of[i]` keys of a part; groups of keys below `least` are seen by all of its queries,
// none at or above `most` by any.
enum class Mask {
  none,   // every query sees every key of the group
  tail,   // the group's last keys are padding, zeros that no query sees
  ragged  // queries see different keys
};
template <class T>
struct Limits {
  T of[kQueries<T>];
  int64_t least, most;
  bool all;  // every query sees every key

  // Bit masks of the queries that see key j, in the tile's first or second vector.
  DNL_INLINE auto allowed(int64_t j, int vector) const { return broadcast(T(j)) < load(of + vector * kLanes<T>); }
  // x, zero where a mask keeps the query from key j.
  template <Mask kMask>
  DNL_INLINE Vec<T> allow(int64_t j, int vector, Vec<T> x) const {
    if constexpr (kMask == Mask::none) return x;
    return allowed(j, vector) ? x : Vec<T>{};
  }
};

template <class T>
Limits<T> limits(const NonlocalParams& p, int64_t b, int64_t query, int64_t count, int64_t part_first,
                 int64_t part_count) {
  Limits<T> r;
  const int64_t total = allowed_keys(p, b);
  const int64_t* index = p.key_index ? p.key_index + b * p.keys : nullptr;
  int64_t seen = index ? 0 : smaller(query + 1, total);
  if (index && p.causal) {
    for (int64_t above = total; seen < above;) {  // the first allowed key beyond the first query
      const int64_t middle = (seen + above) / 2;
      if (index[middle] <= query) seen = middle + 1;
      else above = middle;
    }
  }
  r.all = !p.causal;
  if (r.all) {
    for (int64_t i = 0; i < kQueries<T>; i++) r.of[i] = T(part_count);
    r.least = r.most = part_count;
    return r;
  }
  r.least = part_count;
  r.most = 0;
  for (int64_t i = 0; i < kQueries<T>; i++) {
    if (i >= count) {
      r.of[i] = 0;
      continue;
    }
    if (index == nullptr) seen = smaller(query + i + 1, total);
    else
      while (seen < total && index[seen] <= query + i) seen++;
    const int64_t limit = larger(0, smaller(seen - part_first, part_count));
    r.of[i] = T(limit);
    r.least = smaller(r.least, limit);
    r.most = larger(r.most, limit);
  }
  return r;
}

// ---- Arithmetic of a tile ------------------------------------------------------------------------------------------

// Under huge scores rows are all but one-hot, and dq_i = sum_j delta_ij k_j is a small difference: delta_ij sums to zero,
// but for the rounding of doutput_i . output_i, an error that is multiplied by the keys themselves. In such tiles dq_i =
// sum_j delta_ij (k_j - anchor_i) with the row's mean key as anchor, which differs from the keys that matter by little.
// Elsewhere a Gaussian row is anchored to its query where keys are near it, which costs nothing.
template <class T>
bool anchored(const NonlocalParams& p, int64_t bh, int64_t first, int64_t count) {
  const T* shift = static_cast<const T*>(p.shift) + bh * p.queries + first;
  for (int64_t i = 0; i < count; i++)
    if (shift[i] > 2 * kSafeRange || shift[i] < -2 * kSafeRange) return true;
  return false;
}

// Whether |exponent| <= kSafeRange for all scores of a tile, by Cauchy-Schwarz; false where anything is not finite.
template <class T>
bool safe_exponents(const NonlocalParams& p, const Scales<T>& scale, const T* q, T radius) {
  constexpr int kQ = kQueries<T>;
  // |q| radius, and for a Gaussian (|q| + radius / 2) radius in packed units, must not exceed kSafeRange.
  const double longest = kSafeRange / double(radius) - (p.bandwidth ? 0.5 * scale.query * radius : 0);
  const T most = longest > 0 ? T(longest * longest) : T(-1);
  alignas(64) T norm[kQ];
  store_pair(norm, squared_norms<T>(q, nullptr, p.width));
  int safe = 0;
  for (int i = 0; i < kQ; i++) safe += norm[i] <= most;
  return safe == kQ;
}

// One feature's share of the scores; the first one sets them. A bias comes right after it: where q is near k it has the
// other sign, and the sums stay small.
template <Score kScore, bool kFirst, class T>
DNL_INLINE void add_feature(Scores<T>& s, const T* q, const T* k, const T* bias) {
  const Pair<T> x = load_pair(q);
#pragma GCC unroll 8
  for (int u = 0; u < kKeys; u++) {
    const Vec<T> y = broadcast(k[u]);
    const Vec<T> a = kScore == Score::distance ? -(x.a - y) * (x.a - y) : x.a * y;
    const Vec<T> b = kScore == Score::distance ? -(x.b - y) * (x.b - y) : x.b * y;
    Vec<T>(&to)[2] = s.at[u];
    if constexpr (kFirst) {
      to[0] = a;
      to[1] = b;
      DNL_IN_REGISTER(to[0]);  // else they and the bias become a multiply-add, and a Gaussian's forward 8 % slower
      DNL_IN_REGISTER(to[1]);
      if constexpr (kScore == Score::dot_bias) {
        to[0] += broadcast(bias[u]);
        to[1] += broadcast(bias[u]);
      }
    } else {
      to[0] += a;
      to[1] += b;
    }
  }
}

// s[u] = score of the tile's queries with key u of a group. With sums that start from a product instead of zero, and
// two features a turn, a group overlaps better with the one before.
template <Score kScore, class T>
DNL_INLINE void form_scores(Scores<T>& s, const T* q, const T* k, const T* bias, int64_t width) {
  constexpr int kQ = kQueries<T>;
  add_feature<kScore, true>(s, q, k, bias);
  int64_t d = 1;
  if (width % 2 == 0) add_feature<kScore, false>(s, q + kQ, k + kKeys, bias), d = 2;
  for (; d < width; d += 2) {
    add_feature<kScore, false>(s, q + d * kQ, k + d * kKeys, bias);
    add_feature<kScore, false>(s, q + (d + 1) * kQ, k + (d + 1) * kKeys, bias);
  }
}

// ---- Blocks: a tile against many keys, with weights in rows [key][kRow] --------------------------------------------

// to[u] = score of the tile's queries with key u of `keys`, whole groups.
template <Score kScore, int kRow, class T>
void store_scores(T* to, const T* q, const T* k, const T* bias, int64_t width, int64_t keys) {
  for (int64_t j = 0; j < keys; j += kKeys) {
    Scores<T> s;
    form_scores<kScore>(s, q, k + j * width, bias + j, width);
#pragma GCC unroll 8
    for (int u = 0; u < kKeys; u++) store_pair<T>(to + (j + u) * kRow, {s.at[u][0], s.at[u][1]});
  }
}

// out[f] += sum_j s[j] * panels[f][j] for kFeatures features and `keys` > 0 keys, whole groups. The sum of a block starts
// from zero: rounding grows with the length of a block and the number of blocks, not with their product.
template <int kFeatures, int kRow, class T>
void accumulate_features(T* out, const T* panels, int64_t width, const T* s, int64_t keys) {
  Pair<T> sum[kFeatures] = {};
  int64_t j = 0;
  do {
#pragma GCC unroll 8
    for (int u = 0; u < kKeys; u++, s += kRow) {
      const Pair<T> x = load_pair(s);
#pragma GCC unroll 8
      for (int f = 0; f < kFeatures; f++) {
        const Vec<T> y = broadcast(panels[f * kKeys + u]);
        sum[f].a += x.a * y;
        sum[f].b += x.b * y;
      }
    }
    panels += width * kKeys;
  } while ((j += kKeys) < keys);
#pragma GCC unroll 8
  for (int f = 0; f < kFeatures; f++) {
    const Pair<T> before = load_pair(out + f * kQueries<T>);
    store_pair<T>(out + f * kQueries<T>, {before.a + sum[f].a, before.b + sum[f].b});
  }
}

// The same for 0 < features <= kMost.
template <int kMost, int kRow, class T>
DNL_INLINE void accumulate_part(int64_t features, T* out, const T* panels, int64_t width, const T* s, int64_t keys) {
  if (features == kMost) return accumulate_features<kMost, kRow>(out, panels, width, s, keys);
  if constexpr (kMost > 1) accumulate_part<kMost - 1, kRow>(features, out, panels, width, s, keys);
}

// The same for all features, in parts that differ by one at most: kKeys features have as many sums as a group scores.
template <int kRow, class T>
DNL_INLINE void accumulate(T* out, const T* panels, int64_t width, const T* s, int64_t keys) {
  int64_t f = 0;
  for (int64_t parts = (width + kKeys - 1) / kKeys; parts > 0; parts--) {
    const int64_t features = (width - f + parts - 1) / parts;
    accumulate_part<kKeys, kRow>(features, out + f * kQueries<T>, panels + f * kKeys, width, s, keys);
    f += features;
  }
}

// The same for one group of which queries see different keys: not even a NaN of a key reaches those that do not.
template <int kRow, class T>
DNL_INLINE void accumulate_ragged(T* out, const T* panel, int64_t width, const T* s, const Limits<T>& limit,
                                  int64_t j) {
  for (int64_t f = 0; f < width; f++) {
    T* o = out + f * kQueries<T>;
    Pair<T> sum = load_pair(o);
#pragma GCC unroll 8
    for (int u = 0; u < kKeys; u++) {
      const Vec<T> x = broadcast(panel[f * kKeys + u]);
      const Pair<T> y = load_pair(s + u * kRow);
      sum.a = limit.allowed(j + u, 0) ? sum.a + y.a * x : sum.a;
      sum.b = limit.allowed(j + u, 1) ? sum.b + y.b * x : sum.b;
    }
    store_pair(o, sum);
  }
}

// The keys that some query of a tile sees: blocks of at most `block` keys that all of them see, then single groups.
// body.operator()<mask>(j, keys).
template <class T, class Body>
DNL_INLINE void for_key_blocks(const Limits<T>& limit, int64_t block, Body body) {
  int64_t j = 0;
  for (const int64_t whole = limit.least / kKeys * kKeys; j < whole;) {
    const int64_t keys = smaller(block, whole - j);
    body.template operator()<Mask::none>(j, keys);
    j += keys;
  }
  if (limit.all && j < limit.most) {
    body.template operator()<Mask::tail>(j, kKeys);
    j += kKeys;
  }
  for (; j < limit.most; j += kKeys) body.template operator()<Mask::ragged>(j, kKeys);
}

}  // namespace
}  // namespace dnl::DNL_ISA
