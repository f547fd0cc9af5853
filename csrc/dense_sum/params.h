// y = sum_j w_j * x_j over contiguous states seen as [outer, channels, inner].
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace dnl {

struct DenseSumParams {
  const void* const* states;  // [count] pointers to [outer, channels, inner]
  const void* weight;         // [count, channels], or [count] when channels == 1; one after the other for several sums
  int64_t count, outer, channels, inner;
};

constexpr int64_t kDenseSumTargets = 4;

#define DNL_DECLARE_DENSE_SUM(LEVEL)                                                                       \
  namespace LEVEL {                                                                                        \
  /* [begin, end) of the flattened sums, at most kDenseSumTargets of them: each state is read once for all */ \
  template <class T>                                                                                       \
  void dense_sum_add(const DenseSumParams&, T* const* sums, int64_t targets, bool accumulate, int64_t begin, \
                     int64_t end);                                                                         \
  /* dstates[j][begin, end) = w_j * dy */                                                                  \
  template <class T>                                                                                       \
  void dense_sum_bwd_states(const DenseSumParams&, const T* dy, T* const* dstates, int64_t begin, int64_t end); \
  /* partial[j, channel] = sum over [begin, end) of dy * x_j */                                            \
  template <class T>                                                                                       \
  void dense_sum_bwd_weight(const DenseSumParams&, const T* dy, T* partial, int64_t begin, int64_t end);    \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_DENSE_SUM)

}  // namespace dnl
