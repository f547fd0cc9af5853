// What stands between tensors and the loops of nonlocal_attention, for the operator itself and for the layer, which is
// composed of it: checks are the caller's. (sample, head) pairs are numbered b * h + head; a call is for some of them.
#pragma once
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "nonlocal_attention/params.h"

namespace dnl {

constexpr int64_t kTasks = 8;         // of a backward at least, so that one sample with one head uses several cores:
constexpr int64_t kPartUnit = 24;     // whole groups of keys for every vector length
constexpr int64_t kLeastPart = 264;   // fixed numbers, so that results do not depend on threads

// From this width on torch's own backward of softmax attention is faster: its products are large enough for its GEMM. It
// subtracts log-normalisers from scores, of the keys as they are (such calls are not centred), and larger ones would cost
// more accuracy than eager PyTorch loses.
constexpr int64_t kLargeWidth = 128;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: DNL_CHECK(false, "nonlocal_attention: element type must be float64, float32, bfloat16 or float16");
  }
}

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool centres_keys(const NonlocalParams& p) { return p.bandwidth || (p.normalize && p.width < kLargeWidth); }

// centre and radius
template <class T>
void prepare_keys(const NonlocalParams& p, int64_t first, int64_t last) {
  parallel_tasks(first, last, grain_for(last - first),
                 [&](int64_t begin, int64_t end) { DNL_ISA_CALL(nonlocal_prepare<T>(p, begin, end)); });
}

template <class T>
int64_t tiles_per_pair(const NonlocalParams& p) {
  int64_t tile = 1;
  DNL_ISA_CALL(nonlocal_tile<T>(&tile));
  return ceil_div(p.queries, tile);
}

// The grain for tiles of so many pairs: keys are packed for each piece, hence pieces are whole pairs where they can be.
template <class T>
int64_t tile_grain(const NonlocalParams& p, int64_t pairs) {
  const int64_t tiles = tiles_per_pair<T>(p), grain = grain_for(pairs * tiles);
  return grain > tiles && tiles > 0 ? grain / tiles * tiles : grain;
}

template <class T>
void attend(const NonlocalParams& p, int64_t first, int64_t last) {
  const int64_t tiles = tiles_per_pair<T>(p);
  parallel_tasks(first * tiles, last * tiles, tile_grain<T>(p, last - first), [&](int64_t begin, int64_t end) {
    DNL_ISA_CALL(nonlocal_fwd<T>(p, begin, end));
  });
}

// Backward: how the keys of all pairs are cut.
inline void cut_keys(NonlocalParams& p) {
  const int64_t pairs = p.batch * p.heads, wanted = pairs == 0 ? 1 : ceil_div(kTasks, pairs);
  p.part_keys = std::max<int64_t>(ceil_div(ceil_div(p.keys, wanted), kPartUnit) * kPartUnit, kLeastPart);
  p.parts = std::max<int64_t>(ceil_div(p.keys, p.part_keys), 1);
}

// Whether a row's shift lies beyond +-2 kSafeRange, see NonlocalParams::anchor.
template <class T>
bool needs_anchor(const NonlocalParams& p, int64_t first, int64_t last) {
  const T* shift = static_cast<const T*>(p.shift);
  bool found = false;
  for (int64_t i = first * p.queries; p.normalize && i < last * p.queries; i++) found |= std::abs(shift[i]) > 64;
  return found;
}

template <class T>
void find_anchor(NonlocalParams& p, const NonlocalTensor& anchor, int64_t first, int64_t last) {
  NonlocalParams forward = p;
  forward.value = forward.key;
  forward.value_width = p.width;
  forward.output = anchor;
  forward.anchoring = true;
  attend<T>(forward, first, last);
  p.anchor = anchor;
}

template <class T>
void attend_back(const NonlocalParams& p, int64_t first, int64_t last) {
  parallel_tasks(first * p.parts, last * p.parts, grain_for((last - first) * p.parts), [&](int64_t begin, int64_t end) {
    DNL_ISA_CALL(nonlocal_bwd<T>(p, begin, end));
  });
  if (p.parts == 1) return;
  const int64_t tiles = tiles_per_pair<T>(p);
  parallel_tasks(first * tiles, last * tiles, tile_grain<T>(p, last - first), [&](int64_t begin, int64_t end) {
    DNL_ISA_CALL(nonlocal_sum_parts<T>(p, begin, end));
  });
}

// dbandwidth_h = -2 / (log2(e) bandwidth_h) sum_ij delta_ij s_ij, as s_ij = -|q_i - k_j|^2 log2(e) / (2 bandwidth^2) up to a
// constant of the row: the deltas of a normalised row sum to zero, and unnormalised rows have no constant.
template <class T>
void reduce_moments(const NonlocalParams& p, const T* moments, double* dbandwidth) {
  const int64_t rows = p.batch * p.heads * p.queries;
  const T* sum = static_cast<const T*>(p.sum);
  std::fill(dbandwidth, dbandwidth + p.heads, 0.0);
  for (int64_t i = 0; i < rows; i++) {
    double row = 0, moment = 0, mean = 0;
    for (int64_t part = 0; part < p.parts; part++) {
      const T* at = moments + 3 * (part * rows + i);
      row += at[0], moment += at[1], mean += at[2];
    }
    const double typical = p.normalize && sum[i] > 0 ? mean / sum[i] : 0;
    dbandwidth[i / p.queries % p.heads] += moment - row * typical;
  }
  for (int64_t h = 0; h < p.heads; h++) dbandwidth[h] *= -2 / (kLog2E * p.bandwidth[h]);
}

}  // namespace dnl
