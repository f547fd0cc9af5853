// Elementary functions on the vectors of vec.h, for every instruction-set level.
#pragma once
#include "common/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dnl::DNL_ISA {

template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;

// max(a, b), b where either is NaN.
template <class V>
DNL_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// Whether a > b in any lane.
template <class T>
DNL_INLINE bool any_greater(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (kIsFloat<T>) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (kIsFloat<T>) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)) != 0;
#else
  const auto greater = a > b;
  bool found = false;
  for (int i = 0; i < kLanes<T>; i++) found |= greater[i] != 0;
  return found;
#endif
}

// The most negative finite number.
template <class T>
DNL_INLINE Vec<T> lowest() {
  return broadcast(kIsFloat<T> ? T(-__FLT_MAX__) : T(-__DBL_MAX__));
}

// f = 2^f, best in the relative sense with value 1 at 0, where the level's exp2 needs it: on [0, 1), to which scalef
// reduces, or on [-1/2, 1/2]. Without rounding 8e-8 and 1.1e-7 in float, 3e-18 in double.
template <class T, int n>
DNL_INLINE void exp2_fractions(Vec<T> (&f)[n]) {
#if defined(__AVX512F__)
  constexpr float single[] = {1.8671302e-3f, 9.0170300e-3f, 5.5799913e-2f, 2.4016445e-1f, 6.9315131e-1f, 1.0f};
  constexpr double twice[] = {6.2634661422960210149e-10, 6.559529322770528367e-9,   1.0253212435721934234e-7,
                              1.3208367288951140366e-6,  1.5253175055562795993e-5,  1.5403512309628660399e-4,
                              1.3333558629566755226e-3,  9.6181290995507955717e-3,  5.5504108665602253297e-2,
                              2.4022650695906330204e-1,  6.9314718055994592842e-1,  1.0};
#else
  constexpr float single[] = {1.3264727e-3f, 9.671513e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.93147e-1f, 1.0f};
  constexpr double twice[] = {4.4345922786262156567e-10, 7.0737924992584228645e-9,  1.0178200562181377804e-7,
                              1.3215435225045475412e-6,  1.5252733491458671022e-5,  1.5403530457234681996e-4,
                              1.3333558146775158128e-3,  9.6181291075940165969e-3,  5.5504108664820091257e-2,
                              2.4022650695910130469e-1,  6.9314718055994528623e-1,  1.0};
#endif
  const auto horner = [&f](const auto& c) __attribute__((always_inline)) {
    Vec<T> p[n];
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) p[k] = broadcast<T>(c[0]) * f[k] + broadcast<T>(c[1]);
#pragma GCC unroll 12
    for (unsigned i = 2; i < sizeof(c) / sizeof(c[0]); i++)
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) p[k] = p[k] * f[k] + broadcast<T>(c[i]);
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) f[k] = p[k];
  };
  if constexpr (kIsFloat<T>) horner(single);
  else horner(twice);
}

// x = 2^x, of vectors step by step together, since each alone is one long chain. Exactly 0 far below and inf far above
// the range (results under the smallest normal number may be 0), NaN for NaN. kBounded: the caller knows that |x| <= 120,
// which saves a third of the work without AVX-512.
template <class T, bool kBounded = false, int n>
DNL_INLINE void exp2(Vec<T> (&x)[n]) {
  Vec<T> f[n];
#if defined(__AVX512F__)
#pragma GCC unroll 16
  for (int k = 0; k < n; k++)
    if constexpr (kIsFloat<T>)
      f[k] = (Vec<T>)_mm512_reduce_ps((__m512)x[k], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    else
      f[k] = (Vec<T>)_mm512_reduce_pd((__m512d)x[k], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  exp2_fractions<T>(f);
#pragma GCC unroll 16
  for (int k = 0; k < n; k++)  // scales by 2^floor(x)
    if constexpr (kIsFloat<T>)
      x[k] = (Vec<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)f[k], (__m512)x[k]);
    else
      x[k] = (Vec<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)f[k], (__m512d)x[k]);
#else
  constexpr int kMantissa = kIsFloat<T> ? 23 : 52;
  constexpr T kBias = kIsFloat<T> ? 127 : 1023;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the lowest bits.
  constexpr T kRound = T(3) * (T(1) / 2) * T(int64_t(1) << kMantissa);
  const Vec<T> high = broadcast<T>(kBias + 1);
  Vec<T> v[n], rounded[n];
#pragma GCC unroll 16
  for (int k = 0; k < n; k++) {
    v[k] = kBounded ? x[k] : high < x[k] ? high : x[k];
    rounded[k] = v[k] + broadcast(kRound);
  }
#pragma GCC unroll 16
  for (int k = 0; k < n; k++) f[k] = v[k] - (rounded[k] - broadcast(kRound));
  exp2_fractions<T>(f);
#pragma GCC unroll 16
  for (int k = 0; k < n; k++) {
    using Bits = Vec<typename IntOf<sizeof(T)>::bits>;  // which may wrap: far below the range, where r is not used
    const auto r = __builtin_bit_cast(
        Vec<T>, __builtin_bit_cast(Bits, f[k]) + (__builtin_bit_cast(Bits, rounded[k]) << kMantissa));
    if constexpr (kBounded) {
      x[k] = r;
    } else {
      const Vec<T> above = v[k] < broadcast<T>(1 - kBias) ? Vec<T>{} : r;
      x[k] = x[k] == x[k] ? above : x[k];
    }
  }
#endif
}

}  // namespace dnl::DNL_ISA
