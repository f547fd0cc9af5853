// Winograd's F(2 x 2, 3 x 3) on tiles whose channels lie in the vector lanes. Included by this folder's cpu_kernel files.
#pragma once
#include "common/panel.h"
#include "dnl_bottleneck/params.h"

namespace dnl::DNL_ISA {

// store_partial by a mask, where the level has one: it is in loops over memory here, at every image's end.
template <class T>
DNL_INLINE void store_masked(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)mask, (__m512)v);
  else _mm512_mask_storeu_pd(p, (__mmask8)mask, (__m512d)v);
#elif defined(__AVX2__)
  const IntVec<T> mask = lane_numbers<T>() < typename IntOf<sizeof(T)>::type(n);
  if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p, (__m256i)mask, (__m256)v);
  else _mm256_maskstore_pd(p, (__m256i)mask, (__m256d)v);
#else
  store_partial(p, v, n);
#endif
}

// Along one axis, for the points 0, 1, -1 and infinity (the last with its sign turned): B^T d, A^T m and A y.
template <class V>
DNL_INLINE void input_transform(V& a, V& b, V& c, V& d) {
  const V first = a - c, second = b + c, third = c - b, last = b - d;
  a = first;
  b = second;
  c = third;
  d = last;
}
template <class V>
DNL_INLINE void output_transform(V a, V b, V c, V d, V& first, V& second) {
  first = a + b + c;
  second = b - c - d;
}
template <class V>
DNL_INLINE void spread(V first, V second, V (&to)[4]) {
  to[0] = first;
  to[1] = first + second;
  to[2] = first - second;
  to[3] = -second;
}

// B^T d B of one tile, its pixels by read(row, column, channel): to[point][channel / 16][.][channel % 16].
template <class T, class Read>
DNL_INLINE void transform_tile(const Read& read, int64_t channels, int64_t tiles, int64_t point_stride, T* to) {
  for (int64_t c = 0; c < channels; c += kOutputBlock, to += tiles * kOutputBlock)
#pragma GCC unroll 1
    for (int i = 0; i < kOutputBlock; i += kLanes<T>) {
      Vec<T> d[4][4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; x++) {
#pragma GCC unroll 4
        for (int y = 0; y < 4; y++) d[y][x] = read(y, x, c + i);
        input_transform(d[0][x], d[1][x], d[2][x], d[3][x]);
      }
#pragma GCC unroll 4
      for (int y = 0; y < 4; y++) {
        input_transform(d[y][0], d[y][1], d[y][2], d[y][3]);
#pragma GCC unroll 4
        for (int x = 0; x < 4; x++) store(to + (4 * y + x) * point_stride + i, d[y][x]);
      }
    }
}

// A^T m A: the 2 x 2 outputs of a tile from its 16 products, all of the same channels.
template <class T>
DNL_INLINE void output_tile(const T* products, int64_t point_stride, Vec<T> (&to)[2][2]) {
  Vec<T> half[2][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; x++) {
    const T* m = products + x * point_stride;
    output_transform(load(m), load(m + 4 * point_stride), load(m + 8 * point_stride), load(m + 12 * point_stride),
                     half[0][x], half[1][x]);
  }
#pragma GCC unroll 2
  for (int y = 0; y < 2; y++) output_transform(half[y][0], half[y][1], half[y][2], half[y][3], to[y][0], to[y][1]);
}

// act(z); not inlined where it is long, since a tile has it 16 times.
template <class T, ActivationKind A>
__attribute__((noinline)) Vec<T> activated_by_call(Vec<T> z, T leak) {
  Vec<T> value, slope;
  activate<T, A>(z, leak, value, slope);
  return value;
}
template <class T, ActivationKind A>
DNL_INLINE Vec<T> activated(Vec<T> z, T leak) {
  if constexpr (A == ActivationKind::tanh || A == ActivationKind::gelu || A == ActivationKind::silu)
    return activated_by_call<T, A>(z, leak);
  Vec<T> value, slope;
  activate<T, A>(z, leak, value, slope);
  return value;
}

// The same for channels [begin, end) of z = act(inner.scale * y + inner.shift), zero outside of the image, of tiles
// [first, first + count).
template <class T>
void transform_activated(const BottleneckMaps& maps, const InnerNorm<T>& inner, Activation activation, const T* y,
                         int64_t first, int64_t count, int64_t begin, int64_t end, int64_t point_stride, T* to) {
  const int64_t columns = maps.tile_columns(), per_image = maps.tile_rows() * columns;
  const T leak = T(activation.leak), *scale = inner.scale + begin, *shift = inner.shift + begin;
  dispatch_activation(activation.kind, [&]<ActivationKind A>() __attribute__((always_inline)) {
    for (int64_t t = 0; t < count; t++, to += kOutputBlock) {
      const int64_t tile = first + t, at = tile % per_image;
      const int64_t top = at / columns * 2 - 1, left = at % columns * 2 - 1;
      const int64_t corner = (tile / per_image * maps.height + top) * maps.width + left;
      const auto read = [&](int row, int column, int64_t c) __attribute__((always_inline)) {
        const Vec<T> found = load(y + (corner + row * maps.width + column) * maps.wide + begin + c);
        return activated<T, A>(found * load(scale + c) + load(shift + c), leak);
      };
      const auto read_inside = [&](int row, int column, int64_t c) __attribute__((always_inline)) {
        const bool inside = uint64_t(top + row) < uint64_t(maps.height) && uint64_t(left + column) < uint64_t(maps.width);
        return inside ? read(row, column, c) : Vec<T>{};
      };
      const bool whole = top >= 0 && left >= 0 && top + 4 <= maps.height && left + 4 <= maps.width;
      if (whole) transform_tile<T>(read, end - begin, count, point_stride, to);
      else transform_tile<T>(read_inside, end - begin, count, point_stride, to);
    }
  });
}

// Rows of channels that lie one after the other.
template <class T>
struct Segment {
  const T* rows;
  int64_t count;
};

// See bottleneck_moments.
template <class T>
DNL_INLINE void column_moments(const Segment<T>* segments, int count, int64_t row, int64_t channels, T* to,
                               int64_t stride) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    Vec<T> sum{}, plain{}, square{};
    int64_t numbers = 0;
    for (int s = 0; s < count; s++) {
      for (int64_t i = 0; i < segments[s].count; i++) sum += load(segments[s].rows + i * row + c);
      numbers += segments[s].count;
    }
    const Vec<T> near = sum * broadcast(numbers ? 1 / T(numbers) : T(0));
    for (int s = 0; s < count; s++)
      for (int64_t i = 0; i < segments[s].count; i++) {
        const Vec<T> apart = load(segments[s].rows + i * row + c) - near;
        plain += apart;
        square += apart * apart;
      }
    store(to + c, near);
    store(to + stride + c, plain);
    store(to + 2 * stride + c, square);
  }
}

}  // namespace dnl::DNL_ISA
