// out_i = (1/Z_i) sum_j w(q_i, k_j) v_j: what stands between the operator and its loops. Meaning: reference.py.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace dnl {

constexpr double kLog2E = 1.4426950408889634;

enum class Storage : int { float32, float64, bfloat16, float16 };

// [batch, heads, positions, features] in either layout, by its strides in elements.
struct NonlocalTensor {
  void* data;
  int64_t batch, head, position, feature;
};

struct NonlocalParams {
  NonlocalTensor query, key, value, output;
  NonlocalTensor doutput, dquery, dkey, dvalue;  // backward only
  Storage storage;
  int64_t batch, heads, queries, keys, width, value_width;  // B, h, N, M, D, E
  const double* bandwidth;  // [h], or null for softmax
  double scale;             // of softmax
  bool normalize, causal;
  // Of the keys that key_mask allows, in order: how many for each sample and where; null without a mask.
  const int64_t* key_count;  // [B]
  const int64_t* key_index;  // [B, M]
  // By nonlocal_prepare, in the compute type: what is subtracted from the keys [B, h, D], or nullptr (a Gaussian's mean
  // key; for softmax their common offset, which each row's sum of deltas, zero but for rounding, would carry into
  // dquery), and the largest norm of a key after it [B, h].
  void* centre;
  void* radius;
  // Of the rows, in the compute type [B, h, N]: shift of the base-2 exponent (the maximum, or a bound of it), and
  // sum_j 2^(s_ij - shift_i), 0 where every key is masked. Unnormalised rows have shift 0 and sum 1.
  void* shift;
  void* sum;
  // Backward: the keys of a (sample, head) are cut into `parts` of `part_keys`, whose dq are summed afterwards.
  int64_t parts, part_keys;
  void* dquery_parts;  // [parts, B, h, N, D] in the compute type, null for one part
  void* moments;       // [parts, B, h, N, 3] in the compute type, see Tile; null where dbandwidth is not wanted
  // Backward: sum_j p_ij k_j of the rows whose shift is so large that dq_i must be anchored to it (see tiles.h), or null
  // data. anchoring: this call of nonlocal_fwd computes it, with the keys as values; it leaves shift and sum alone.
  NonlocalTensor anchor;
  bool anchoring;
};

#define DNL_DECLARE_NONLOCAL(LEVEL)                                                                   \
  namespace LEVEL {                                                                                   \
  /* queries per tile, of which there are B * h * ceil(N / tile) */                                   \
  template <class T> void nonlocal_tile(int64_t* queries);                           \
  /* centre and radius of the (sample, head) pairs [begin, end) */                                    \
  template <class T> void nonlocal_prepare(const NonlocalParams&, int64_t begin, int64_t end);        \
  /* tiles [begin, end) */                                                                            \
  template <class T> void nonlocal_fwd(const NonlocalParams&, int64_t begin, int64_t end);            \
  /* (sample, head, part) [begin, end) */                                                             \
  template <class T> void nonlocal_bwd(const NonlocalParams&, int64_t begin, int64_t end);            \
  /* dquery = the sum of its parts, for tiles [begin, end) */                                         \
  template <class T> void nonlocal_sum_parts(const NonlocalParams&, int64_t begin, int64_t end);      \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_NONLOCAL)

}  // namespace dnl
