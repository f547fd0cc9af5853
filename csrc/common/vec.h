// Vectors of the instruction-set level that this file is compiled for, from GCC's portable vector types: the same
// source gives AVX-512, AVX2, SSE2 and NEON code. Included by cpu_kernel files only (see isa.h).
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef DNL_ISA
#error "vec.h belongs to cpu_kernel*.cpp, which is compiled with -DDNL_ISA=<level>"
#endif

#if defined(__AVX512F__)
#define DNL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DNL_VECTOR_BYTES 32
#else
#define DNL_VECTOR_BYTES 16
#endif
#define DNL_INLINE inline __attribute__((always_inline))
// Keeps the compiler from reading a vector again, as an operand in memory, for each of its uses.
#if defined(__AVX512F__)
#define DNL_IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__)
#define DNL_IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define DNL_IN_REGISTER(v)
#endif

namespace dnl::DNL_ISA {

template <class T, int kBytes = DNL_VECTOR_BYTES>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = DNL_VECTOR_BYTES / sizeof(T);

// The same vector at any address of a T. Unlike memcpy, a store through it changes no pointer or counter, as far as the
// compiler is concerned, which may then stay in a register.
template <class T>
struct UnalignedOf {
  typedef T type __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(alignof(T))));
};
template <class T>
DNL_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename UnalignedOf<T>::type*>(p);
}
template <class T>
DNL_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename UnalignedOf<T>::type*>(p) = v;
}
template <class T>
DNL_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};
}
// Integers as wide as T's, one per lane: comparison results and shuffle indices.
template <int bytes>
struct IntOf;
template <>
struct IntOf<4> {
  typedef int32_t type;
  typedef uint32_t bits;
};
template <>
struct IntOf<8> {
  typedef int64_t type;
  typedef uint64_t bits;
};
template <class T>
using IntVec = Vec<typename IntOf<sizeof(T)>::type>;

template <class T>
DNL_INLINE IntVec<T> lane_numbers() {
  IntVec<T> lane;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; i++) lane[i] = i;
  return lane;
}
// v with zeros after its first n lanes.
template <class T>
DNL_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  const typename IntOf<sizeof(T)>::type count = n < kLanes<T> ? n : kLanes<T>;
  return lane_numbers<T>() < count ? v : Vec<T>{};
}
// The first n lanes, 0 <= n <= lanes, the others `fill`: reads nothing behind them.
template <class T>
DNL_INLINE Vec<T> load_partial(const T* p, int n, T fill = T(0)) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)broadcast(fill), (__mmask16)mask, p);
  else
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)broadcast(fill), (__mmask8)mask, p);
#elif defined(__AVX2__)
  const IntVec<T> mask = lane_numbers<T>() < typename IntOf<sizeof(T)>::type(n);
  Vec<T> v;
  if constexpr (sizeof(T) == 4)
    v = (Vec<T>)_mm256_maskload_ps(p, (__m256i)mask);
  else
    v = (Vec<T>)_mm256_maskload_pd(p, (__m256i)mask);
  return mask ? v : broadcast(fill);
#else
  Vec<T> v = broadcast(fill);
  memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}
// Writes the first n lanes, 0 <= n <= lanes, and nothing behind them.
template <class T>
DNL_INLINE void store_partial(T* p, Vec<T> v, int n) {
  T lane[kLanes<T>];
  memcpy(lane, &v, sizeof v);
  if (n == kLanes<T>) return store(p, v);
  int at = 0;
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2)  // in powers of two: a call of memcpy costs more
    if (n & half) {
      memcpy(p + at, lane + at, half * sizeof(T));
      at += half;
    }
}
template <class T>
DNL_INLINE T sum_lanes(Vec<T> v) {
#if defined(__clang__)  // has no shuffle by a vector of indices
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
#else
  const IntVec<T> lane = lane_numbers<T>();
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
#endif
  return v[0];
}

// Rows become columns: log2(lanes) rounds of interleaving each row with the one half the rows further on.
template <class T>
DNL_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)
  T from[n][n];
  memcpy(from, rows, sizeof from);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) rows[i][j] = from[j][i];
#else
  decltype(rows[0] < rows[0]) low, high;
  for (int i = 0; i < n; i++) {
    low[i] = i / 2 + i % 2 * n;
    high[i] = low[i] + n / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) rows[i] = next[i];
  }
#endif
}

}  // namespace dnl::DNL_ISA
