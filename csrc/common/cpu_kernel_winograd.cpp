// Loops of common/winograd.h.
#include "common/activation.h"
#include "common/rows3.h"
#include "common/vec.h"
#include "common/winograd.h"

namespace dnl::DNL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // of a register tile of three vectors
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kSlack = 16;  // at both ends of a line of pixels
// Channels whose lines are written before they are read, at other places than they were written: a load waits for
// stores that it does not match.
constexpr int64_t kAtOnce = 4;

// Every second element of two vectors, from the first or the second on.
template <class T, int first>
DNL_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  Vec<T> found;
  for (int i = 0; i < kLanes<T>; i++) found[i] = 2 * i + first < kLanes<T> ? a[2 * i + first] : b[2 * i + first - kLanes<T>];
  return found;
#else
  return __builtin_shuffle(a, b, lane_numbers<T>() * 2 + first);
#endif
}

// Elements of a and b in turn: the first half, or the second half of both.
template <class T, int half>
DNL_INLINE Vec<T> in_turn(Vec<T> a, Vec<T> b) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)
  Vec<T> found;
  for (int i = 0; i < n; i++) found[i] = (i % 2 ? b : a)[half * n / 2 + i / 2];
  return found;
#else
  const IntVec<T> lane = lane_numbers<T>();
  return __builtin_shuffle(a, b, (lane >> 1) + (lane & 1) * n + half * n / 2);
#endif
}

// Which tiles begin and which end a row of tiles.
template <class T>
struct Ends {
  alignas(64) typename IntOf<sizeof(T)>::type begins[kLongRun], ends[kLongRun];

  explicit Ends(const TileRun& run) {
    for (int64_t t = 0; t < run.pitch; t++) {
      const int64_t column = (run.first + t) % run.grid.columns();
      begins[t] = column == 0 ? -1 : 0;
      ends[t] = column + 1 == run.grid.columns() || t >= run.count ? -1 : 0;
    }
  }
  static DNL_INLINE IntVec<T> at(const typename IntOf<sizeof(T)>::type* p) {
    IntVec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
  }
};

template <class T>
DNL_INLINE void fill_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    p[i] = T(0);
    __asm__ volatile("" ::: "memory");  // no call of memset for a few numbers
  }
}

// The parts along the rows of one channel: six lines of pixels, flat over the rows of tiles of the run.
template <class T, ActivationKind A>
DNL_INLINE void gather_lines(const TileRun& run, Planes<const T> from, T scale, T shift, T leak, T (*lines)[2 * kLongRun + 2 * kSlack]) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t height = run.grid.height, width = run.grid.width, columns = run.grid.columns();
  const Vec<T> s = broadcast(scale), h = broadcast(shift);
  run.for_each_row([&](int64_t image, int64_t row, int64_t column, int64_t n, int64_t at) __attribute__((always_inline)) {
    const T* plane = from.data + image * from.image_stride;
    // One pixel more on either side where the run ends within a row.
    const int64_t begin = column > 0 ? kTileColumns * column - 1 : 0;
    const int64_t past = kTileColumns * (column + n), end = column + n < columns ? past + 1 : width;
    const int64_t top = kTileRows * row - 1;
    const int64_t to = kSlack + kTileColumns * (at - column);  // of pixel 0 of the row in a line
    for (int64_t x = begin; x < end; x += lanes) {
      Vec<T> d[6], t[6];
      const int left = int(end - x < lanes ? end - x : lanes);
      const bool whole = left == lanes || (top + 5) * width + x + lanes <= height * width;
      const auto read = [&](int64_t y) __attribute__((always_inline)) {
        if (y < 0 || y >= height) return Vec<T>{};
        const T* p = plane + y * width + x;
        Vec<T> value, slope;
        activate<T, A>((whole ? load(p) : load_partial(p, left)) * s + h, leak, value, slope);
        return value;
      };
#pragma GCC unroll 6
      for (int r = 0; r < 6; r++) d[r] = read(top + r);
      Rows3::analyse(d, t);
#pragma GCC unroll 6
      for (int k = 0; k < 6; k++) store(lines[k] + to + x, t[k]);
    }
    if (end == width && past > width)
      for (int k = 0; k < 6; k++) lines[k][to + width] = T(0);  // an odd width's last tile
  });
  // Behind the run's last pixel, and behind the one that it needs of the next tile.
  const int64_t tile = run.first + run.count;
  const int64_t last = kTileColumns * run.count + (tile % columns != 0 ? 1 : 0);
  const int64_t room = kTileColumns * run.padded() + 2;
  for (int k = 0; k < 6; k++) fill_zero(lines[k] + kSlack + last, room - last);
}

// A tile of R rows and V vectors of a product.
template <class T, int R, int V>
DNL_INLINE void multiply_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                              bool accumulate, T* to, int64_t to_row) {
  Vec<T> sum[R][V] = {};
  for (int64_t k = 0; k < depth; k++, a += a_step, b += b_step) {
    Vec<T> in[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) in[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<T> w = broadcast(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] += in[v] * w;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      T* out = to + r * to_row + v * kLanes<T>;
      store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
    }
}

template <class T, int R, bool kUnit>
DNL_INLINE void multiply_rows(int64_t depth, int64_t columns, const T* a, int64_t a_row, int64_t a_step, const T* b,
                              int64_t b_step, bool accumulate, T* to, int64_t to_row) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t row = kUnit ? 1 : a_row, step = kUnit ? a_step : 1;
  int64_t j = 0;
  for (; j + 3 * lanes <= columns; j += 3 * lanes)
    multiply_tile<T, R, 3>(depth, a, row, step, b + j, b_step, accumulate, to + j, to_row);
  if (j + 2 * lanes <= columns) {
    multiply_tile<T, R, 2>(depth, a, row, step, b + j, b_step, accumulate, to + j, to_row);
    j += 2 * lanes;
  }
  if (j < columns) multiply_tile<T, R, 1>(depth, a, row, step, b + j, b_step, accumulate, to + j, to_row);
}

template <class T, bool kUnit>
DNL_INLINE void multiply_all(int64_t rows, int64_t depth, int64_t columns, const T* a, int64_t a_row, int64_t a_step,
                             const T* b, int64_t b_step, bool accumulate, T* to, int64_t to_row) {
  int64_t i = 0;
  const auto rows_of = [&]<int R>() __attribute__((always_inline)) {
    multiply_rows<T, R, kUnit>(depth, columns, a + i * a_row, a_row, a_step, b, b_step, accumulate, to + i * to_row,
                               to_row);
    i += R;
  };
  while (i + kRows <= rows) rows_of.template operator()<kRows>();
  if constexpr (kRows > 4)
    if (i + 6 <= rows) rows_of.template operator()<6>();
  if constexpr (kRows > 4)
    if (i + 4 <= rows) rows_of.template operator()<4>();
  if (i + 2 <= rows) rows_of.template operator()<2>();
  if (i < rows) rows_of.template operator()<1>();
}

}  // namespace

template <class T>
void winograd_filters(const T* weight, int64_t output_stride, int64_t channel_stride, bool mirrored, double factor,
                      int64_t outputs, int64_t channels, int64_t begin, int64_t end, T* filters) {
  constexpr int64_t kBlock = 32;
  double w[9][kBlock], half[3][kBlock];  // G w, a row at a time
  for (int64_t c = begin; c < end; c++)
    for (int64_t first = 0; first < outputs; first += kBlock) {
      const int64_t n = outputs - first < kBlock ? outputs - first : kBlock;
      for (int64_t o = 0; o < n; o++) {
        const T* from = weight + (first + o) * output_stride + c * channel_stride;
        for (int t = 0; t < 9; t++) w[t][o] = factor * double(from[mirrored ? 8 - t : t]);
      }
      for (int64_t o = n; o < kBlock; o++)
        for (int t = 0; t < 9; t++) w[t][o] = 0;
      for (int i = 0; i < 6; i++) {
        const double* g = kFilterTransform[i];
        for (int t = 0; t < 3; t++)
          for (int64_t o = 0; o < kBlock; o++) half[t][o] = g[0] * w[t][o] + g[1] * w[3 + t][o] + g[2] * w[6 + t][o];
        for (int j = 0; j < 4; j++) {
          const double* g2 = kColumnTransform[j];
          T* to = filters + ((i * 4 + j) * channels + c) * outputs + first;
          for (int64_t o = 0; o < n; o++) to[o] = T(g2[0] * half[0][o] + g2[1] * half[1][o] + g2[2] * half[2][o]);
        }
      }
    }
}

template <class T>
void winograd_gather(const TileRun& run, Planes<const T> from, int64_t channels, const T* scale, const T* shift,
                     Activation activation, int64_t step, T* parts) {
  constexpr int64_t lanes = kLanes<T>;
  const Ends<T> ends(run);
  const T leak = T(activation.leak);
  alignas(64) T written[kAtOnce][6][2 * kLongRun + 2 * kSlack];
  dispatch_activation(activation.kind, [&]<ActivationKind A>() {
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t i = c; c % kAtOnce == 0 && i < channels && i < c + kAtOnce; i++) {
        const Planes<const T> plane{from.data + i * from.channel_stride, from.image_stride, 0};
        gather_lines<T, A>(run, plane, scale ? scale[i] : T(1), shift ? shift[i] : T(0), leak, written[i - c]);
      }
      const auto& lines = written[c % kAtOnce];
      for (int64_t t = 0; t < run.padded(); t += lanes) {
        const IntVec<T> begins = ends.at(ends.begins + t), finishes = ends.at(ends.ends + t);
        T* to = parts + c * run.pitch + t;
#pragma GCC unroll 6
        for (int k = 0; k < 6; k++) {
          const T* p = lines[k] + kSlack + 2 * t;
          const Vec<T> a = load(p), b = load(p + lanes);
          const Vec<T> even = every_second<T, 0>(a, b), odd = every_second<T, 1>(a, b);
          Vec<T> before = every_second<T, 1>(load(p - 2), load(p - 2 + lanes));
          Vec<T> after = every_second<T, 0>(load(p + 2), load(p + 2 + lanes));
          before = begins ? Vec<T>{} : before;
          after = finishes ? Vec<T>{} : after;
          store(to + (4 * k) * step, before - odd);
          store(to + (4 * k + 1) * step, even + odd);
          store(to + (4 * k + 2) * step, odd - even);
          store(to + (4 * k + 3) * step, after - even);
        }
      }
    }
  });
}

template <class T>
void winograd_scatter(const TileRun& run, const T* products, int64_t step, T* rows) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = 2 * run.pitch;
  for (int64_t t = 0; t < run.padded(); t += lanes) {
    Vec<T> even[6], odd[6], a[4], b[4];
#pragma GCC unroll 6
    for (int k = 0; k < 6; k++) {
      const T* p = products + 4 * k * step + t;
      const Vec<T> m1 = load(p + step), m2 = load(p + 2 * step);
      even[k] = load(p) + (m1 + m2);
      odd[k] = (m1 - m2) + load(p + 3 * step);
    }
    Rows3::synthesise(even, a);
    Rows3::synthesise(odd, b);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      store(rows + r * pitch + 2 * t, in_turn<T, 0>(a[r], b[r]));
      store(rows + r * pitch + 2 * t + lanes, in_turn<T, 1>(a[r], b[r]));
    }
  }
}

template <class T>
void winograd_spread(const TileRun& run, Planes<const T> dy, int64_t outputs, int64_t output_pitch, T* room, T* parts) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t height = run.grid.height, width = run.grid.width, pitch = run.pitch, step = part_step(lanes * pitch);
  const int64_t count = run.padded();
  alignas(64) T lines[4][2 * kLongRun + kSlack];
  for (int64_t first = 0; first < output_pitch; first += lanes) {
    for (int64_t o = 0; o < lanes; o++) {
      T* to = room + o * pitch;
      if (first + o >= outputs) {
        for (int64_t p = 0; p < kProducts; p++)
          for (int64_t t = 0; t < count; t += lanes) store(to + p * step + t, Vec<T>{});
        continue;
      }
      run.for_each_row([&](int64_t image, int64_t row, int64_t column, int64_t n, int64_t at) {
        const T* plane = dy.data + image * dy.image_stride + (first + o) * dy.channel_stride;
        const int64_t begin = kTileColumns * column, past = begin + kTileColumns * n, end = past < width ? past : width;
        for (int64_t r = 0; r < 4; r++) {
          const int64_t y = kTileRows * row + r;
          T* line = lines[r] + kTileColumns * (at - column);
          for (int64_t x = begin; x < end; x += lanes) {
            const int left = int(end - x < lanes ? end - x : lanes);
            const T* p = plane + y * width + x;
            store(line + x, y >= height ? Vec<T>{} : left == lanes ? load(p) : load_partial(p, left));
          }
          if (past > width) line[width] = T(0);
        }
      });
      for (int r = 0; r < 4; r++) fill_zero(lines[r] + 2 * run.count, 2 * (count - run.count));
      for (int64_t t = 0; t < count; t += lanes) {
        Vec<T> even[4], odd[4], a[6], b[6];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          const Vec<T> u = load(lines[r] + 2 * t), v = load(lines[r] + 2 * t + lanes);
          even[r] = every_second<T, 0>(u, v);
          odd[r] = every_second<T, 1>(u, v);
        }
        Rows3::spread(even, a);
        Rows3::spread(odd, b);
#pragma GCC unroll 6
        for (int k = 0; k < 6; k++) {
          T* out = to + 4 * k * step + t;
          store(out, a[k]);
          store(out + step, a[k] + b[k]);
          store(out + 2 * step, a[k] - b[k]);
          store(out + 3 * step, b[k]);
        }
      }
    }
    for (int64_t p = 0; p < kProducts; p++)
      for (int64_t t = 0; t < count; t += lanes) {
        Vec<T> block[lanes];
#pragma GCC unroll 16
        for (int o = 0; o < lanes; o++) block[o] = load(room + p * step + o * pitch + t);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) store(parts + (p * pitch + t + i) * output_pitch + first, block[i]);
      }
  }
}

template <class T>
void multiply(int64_t rows, int64_t depth, int64_t columns, const T* a, int64_t a_row, int64_t a_step, const T* b,
              int64_t b_step, bool accumulate, T* to, int64_t to_row) {
  if (a_row == 1)
    multiply_all<T, true>(rows, depth, columns, a, 1, a_step, b, b_step, accumulate, to, to_row);
  else
    multiply_all<T, false>(rows, depth, columns, a, a_row, 1, b, b_step, accumulate, to, to_row);
}

#define DNL_INSTANTIATE(T)                                                                                             \
  template void winograd_filters<T>(const T*, int64_t, int64_t, bool, double, int64_t, int64_t, int64_t, int64_t, T*); \
  template void winograd_gather<T>(const TileRun&, Planes<const T>, int64_t, const T*, const T*, Activation, int64_t,  \
                                   T*);                                                                                \
  template void winograd_scatter<T>(const TileRun&, const T*, int64_t, T*);                                            \
  template void winograd_spread<T>(const TileRun&, Planes<const T>, int64_t, int64_t, T*, T*);                         \
  template void multiply<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, const T*, int64_t, bool, T*,        \
                            int64_t);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
