// Forward of nonlocal_attention: for each tile of queries one pass over the packed keys and values. The row's maximum is
// only tracked (and earlier sums rescaled) where no bound tells that exponents stay in a safe range.
#include "nonlocal_attention/tiles.h"

namespace dnl::DNL_ISA {
namespace {

// Keys whose weights are formed before they meet the values; whole groups for every vector length.
constexpr int64_t kBlockKeys = 192;

template <class T>
struct Tile {
  const T* q;     // [D][kQueries]
  T* out;         // [E][kQueries]
  T* weight;      // [kBlockKeys][kQueries]
  Pair<T> shift;  // of the exponents
  Pair<T> sum;    // of the weights
};

// Exponents are bounded (safe_exponents), taken as they are (unnormalised), or shifted by the maximum so far.
enum class Exponents { bounded, plain, online };

// Raises the tile's shift to the maximum of `keys` scores more, and rescales what was summed with the former one.
template <Mask kMask, class T>
void raise_shift(Tile<T>& t, int64_t value_width, const Limits<T>& limit, int64_t j, int64_t keys) {
  Pair<T> top = t.shift;
  for (int64_t u = 0; u < keys; u++) {
    const Pair<T> s = load_pair(t.weight + u * kQueries<T>);
    const Pair<T> higher{maximum(s.a, top.a), maximum(s.b, top.b)};
    if constexpr (kMask == Mask::none)
      top = higher;
    else
      top = {limit.allowed(j + u, 0) ? higher.a : top.a, limit.allowed(j + u, 1) ? higher.b : top.b};
  }
  if (!any_greater<T>(top.a, t.shift.a) && !any_greater<T>(top.b, t.shift.b)) return;
  const Pair<T> factor = exp2_pair<false>(Pair<T>{t.shift.a - top.a, t.shift.b - top.b});
  t.sum = {t.sum.a * factor.a, t.sum.b * factor.b};
  scale_rows<T>(t.out, value_width, factor);
  t.shift = top;
}

// As many weights as are added up one after another. Rows are sums of positive numbers: the rounding of a plain sum of
// hundreds would be the largest error that there is, of the output and of every gradient.
constexpr int64_t kSummed = 48;

// weight = 2^(score - shift) of `keys` keys, in place, and their sum.
template <Exponents kExponents, Mask kMask, class T>
void form_weights(Tile<T>& t, const Limits<T>& limit, int64_t j, int64_t keys) {
  constexpr bool kBounded = kExponents == Exponents::bounded;
  const Pair<T> shift = t.shift;
  T* weight = t.weight;
  for (int64_t first = 0; first < keys; first += kSummed) {
    Pair<T> sum{};
    for (int64_t u = first, last = smaller(keys, first + kSummed); u < last; u++, weight += kQueries<T>) {
      Pair<T> x = load_pair(weight);
      if constexpr (kExponents == Exponents::online) x = {x.a - shift.a, x.b - shift.b};
      x = exp2_pair<kBounded>(x);
      x = {limit.template allow<kMask>(j + u, 0, x.a), limit.template allow<kMask>(j + u, 1, x.b)};
      store_pair(weight, x);
      sum = {sum.a + x.a, sum.b + x.b};
      DNL_IN_REGISTER(sum.a);
      DNL_IN_REGISTER(sum.b);
    }
    t.sum = {t.sum.a + sum.a, t.sum.b + sum.b};
  }
}

template <Score kScore, Exponents kExponents, Mask kMask, class T>
DNL_INLINE void add_keys(Tile<T>& t, const T* k, const T* v, const T* bias, int64_t width, int64_t value_width,
                         const Limits<T>& limit, int64_t j, int64_t keys) {
  constexpr int kQ = kQueries<T>;
  store_scores<kScore, kQ, T>(t.weight, t.q, k, bias, width, keys);
  if constexpr (kExponents == Exponents::online) raise_shift<kMask>(t, value_width, limit, j, keys);
  form_weights<kExponents, kMask>(t, limit, j, keys);
  if constexpr (kMask == Mask::ragged) accumulate_ragged<kQ>(t.out, v, value_width, t.weight, limit, j);
  else accumulate<kQ>(t.out, v, value_width, t.weight, keys);
}

template <Score kScore, Exponents kExponents, class T>
void add_blocks(Tile<T>& t, const T* k, const T* v, const T* bias, int64_t width, int64_t value_width,
                const Limits<T>& limit) {
  for_key_blocks(limit, kBlockKeys, [&]<Mask kMask>(int64_t j, int64_t keys) {
    add_keys<kScore, kExponents, kMask>(t, k + j * width, v + j * value_width, bias + j, width, value_width, limit, j,
                                        keys);
  });
}

template <Score kScore, class T>
void run_tiles(const NonlocalParams& p, int64_t begin, int64_t end) {
  constexpr int kQ = kQueries<T>;
  const int64_t D = p.width, E = p.value_width, N = p.queries;
  const int64_t tiles = (N + kQ - 1) / kQ, padded = round_up(p.keys, kKeys);
  Buffer<T> keys(padded * D), values(padded * E), bias(padded), q(D * kQ), out(E * kQ),
      weight(kBlockKeys * kQ);
  Scales<T> scale{};
  int64_t packed = -1, count = 0;
  for (int64_t task = begin; task < end; task++) {
    const int64_t bh = task / tiles, b = bh / p.heads, h = bh % p.heads, first = task % tiles * kQ;
    const int64_t n = smaller(kQ, N - first);
    if (p.anchoring && !anchored<T>(p, bh, first, n)) continue;
    const T* centre = centre_of<T>(p, b, h);
    if (bh != packed) {
      count = allowed_keys(p, b);
      scale = scales<T>(p, kScore, h);
      pack_panels<T>(p, p.key, b, h, 0, count, D, keys, q);
      if (centre) finish_keys<T>(scale, centre, count, D, keys, bias);
      pack_panels<T>(p, p.value, b, h, 0, count, E, values, out);
      packed = bh;
    }
    read_lanes<T>(p, p.query, b, h, nullptr, first, n, D, q);
    finish_queries<T>(scale, query_centre(p, centre), n, D, q);
    memset(out, 0, E * kQ * sizeof(T));
    const Limits<T> limit = limits<T>(p, b, first, n, 0, count);
    Tile<T> tile{q, out, weight, {}, {}};
    if constexpr (kScore != Score::distance) {
      if (p.normalize && safe_exponents<T>(p, scale, q, static_cast<const T*>(p.radius)[bh])) {
        add_blocks<kScore, Exponents::bounded, T>(tile, keys, values, bias, D, E, limit);
      } else if (p.normalize) {
        tile.shift = {lowest<T>(), lowest<T>()};
        add_blocks<kScore, Exponents::online, T>(tile, keys, values, bias, D, E, limit);
      }
    }
    if (!p.normalize) {
      if constexpr (kScore != Score::dot_bias) add_blocks<kScore, Exponents::plain, T>(tile, keys, values, bias, D, E, limit);
    }
    alignas(64) T shift[kQ], sum[kQ];
    store_pair(shift, tile.shift);
    store_pair(sum, tile.sum);
    for (int64_t i = 0; i < kQ; i++) {
      if (sum[i] == 0) shift[i] = 0;  // a row without keys: its maximum was never found
      if (!p.normalize) sum[i] = 1;
    }
    if (!p.anchoring) {
      memcpy(static_cast<T*>(p.shift) + bh * N + first, shift, n * sizeof(T));
      memcpy(static_cast<T*>(p.sum) + bh * N + first, sum, n * sizeof(T));
    }
    if (p.normalize) {
      for (int64_t i = 0; i < kQ; i++) sum[i] = sum[i] == 0 ? T(0) : 1 / sum[i];
      scale_rows<T>(out, E, load_pair(sum));
    }
    write_lanes<T>(p, p.output, b, h, nullptr, first, n, E, out);
  }
}

constexpr int kGroups = 4;  // of keys, each fourth

template <class T>
T mean(const double* sum, const int64_t* count) {
  double s = 0;
  int64_t n = 0;
  for (int g = 0; g < kGroups; g++) s += sum[g], n += count[g];
  return n ? T(s / n) : T(0);
}

// The mean of the group where it is least, and 0 where the groups differ in sign: what the keys have in common, however
// far away a few of them are.
template <class T>
T common_offset(const double* sum, const int64_t* count) {
  double low = INFINITY, high = -INFINITY;
  for (int g = 0; g < kGroups; g++) {
    if (!count[g]) continue;
    const double m = sum[g] / count[g];
    low = m < low ? m : low;
    high = m > high ? m : high;
  }
  return low > high ? T(0) : low > 0 ? T(low) : high < 0 ? T(high) : T(0);
}

}  // namespace

template <class T>
void nonlocal_tile(int64_t* queries) {
  *queries = kQueries<T>;
}

template <class T>
void nonlocal_prepare(const NonlocalParams& p, int64_t begin, int64_t end) {
  constexpr int kQ = kQueries<T>;
  const int64_t D = p.width;
  Buffer<T> lanes(kQ * D);
  Buffer<double> sum(kGroups * D);
  Buffer<int64_t> finite(kGroups * D);
  for (int64_t bh = begin; bh < end; bh++) {
    const int64_t b = bh / p.heads, h = bh % p.heads, count = allowed_keys(p, b);
    T* centre = p.centre ? static_cast<T*>(p.centre) + bh * D : nullptr;
    if (centre) {
      for (int64_t d = 0; d < kGroups * D; d++) sum[d] = 0, finite[d] = 0;
      for_key_lanes<T>(p, p.key, b, h, 0, count, D, lanes, [&](int64_t j, int64_t n) {
        for (int64_t d = 0; d < D; d++) {
          for (int64_t i = 0; i < n; i++) {
            const T x = lanes[d * kQ + i];
            const bool ok = x - x == 0;  // a NaN or an infinity must not spoil the other keys
            const int64_t at = d * kGroups + (j + i) % kGroups;
            sum[at] += ok ? x : T(0);
            finite[at] += ok;
          }
        }
      });
      for (int64_t d = 0; d < D; d++)
        centre[d] = p.bandwidth ? mean<T>(sum + d * kGroups, finite + d * kGroups)
                                : common_offset<T>(sum + d * kGroups, finite + d * kGroups);
    }
    T largest = 0;
    if (p.normalize)
      for_key_lanes<T>(p, p.key, b, h, 0, count, D, lanes, [&](int64_t, int64_t n) {
        alignas(64) T norm[kQ];
        store_pair(norm, squared_norms<T>(lanes, centre, D));
        for (int64_t i = 0; i < n; i++)
          if (norm[i] > largest || norm[i] != norm[i]) largest = norm[i];  // a NaN stays: no bound is known
      });
    static_cast<T*>(p.radius)[bh] = T(sqrt(double(largest)));
  }
}

template <class T>
void nonlocal_fwd(const NonlocalParams& p, int64_t begin, int64_t end) {
  with_score(p, [&]<Score kScore>() { run_tiles<kScore, T>(p, begin, end); });
}

#define DNL_INSTANTIATE(T)                                                      \
  template void nonlocal_tile<T>(int64_t*);                                     \
  template void nonlocal_prepare<T>(const NonlocalParams&, int64_t, int64_t);   \
  template void nonlocal_fwd<T>(const NonlocalParams&, int64_t, int64_t);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
