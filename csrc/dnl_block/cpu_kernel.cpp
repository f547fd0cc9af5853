// Loops of dnl_block/params.h: between rows of pixels and planes of parts. Lanes run along the width.
#include "dnl_block/params.h"

#include "common/activation.h"
#include "common/rows3.h"
#include "common/vec.h"

namespace dnl::DNL_ISA {
namespace {

struct Rows1 {
  static constexpr int kRows = 1, kParts = 1, kReach = 0;
  template <class V>
  static DNL_INLINE void analyse(const V (&d)[1], V (&t)[1]) { t[0] = d[0]; }
  template <class V>
  static DNL_INLINE void synthesise(const V (&m)[1], V (&y)[1]) { y[0] = m[0]; }
  template <class V>
  static DNL_INLINE void spread(const V (&y)[1], V (&t)[1]) { t[0] = y[0]; }
  template <class V>
  static DNL_INLINE void gather_back(const V (&m)[1], V, V, V (&d)[1]) { d[0] = m[0]; }
};

template <class Body>
DNL_INLINE void dispatch_form(const Tile& tile, Body body) {
  if (tile.flat.radius)
    body.template operator()<Rows3>();
  else
    body.template operator()<Rows1>();
}

// A tile as the loops see it. Rows that no filter mixes are one long row.
struct View {
  int64_t images, rows, width;
  int64_t above, below;  // rows of the image before and after those of the tile
  int64_t offset;        // of the tile in a plane of pixels
  int64_t readable;      // pixels from there to the end of the plane
  FlatPlane parts;

  explicit View(const Tile& t) : images(t.flat.images), offset(t.row * t.flat.width) {
    const FlatPlane& f = t.flat;
    const bool mixed = f.radius > 0;
    rows = mixed ? f.rows : 1;
    width = mixed ? f.width : f.rows * f.width;
    above = mixed ? t.row : 0;
    below = mixed ? t.height - t.row - f.rows : 0;
    readable = (t.height - t.row) * f.width;
    parts = mixed ? grouped(f) : FlatPlane{f.images, 1, width, 0, 0};
  }
  template <class T>
  const T* plane(Planes<const T> p, int64_t image, int64_t channel) const {
    return p.data ? p.data + image * p.image_stride + channel * p.channel_stride + offset : nullptr;
  }
  template <class T>
  T* plane(Planes<T> p, int64_t image, int64_t channel) const {
    return p.data ? p.data + image * p.image_stride + channel * p.channel_stride + offset : nullptr;
  }
};

template <class T>
DNL_INLINE void fill_zero(T* p, int64_t n) {
  Vec<T> none{};
  DNL_IN_REGISTER(none);  // else calls of memset
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(p + i, none);
  for (; i < n; i++) p[i] = none[0];
}

template <class T>
DNL_INLINE T entry(const T* p, int64_t i, T absent) {
  return p ? p[i] : absent;
}

// B^T act(scale * x + shift) of one channel of one image. kNarrow: a row is shorter than a vector.
template <class T, class F, ActivationKind A, bool kNarrow>
DNL_INLINE void gather_plane(const View& v, const T* x, T scale, T shift, T leak, T* to, int64_t stride) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> s = broadcast(scale), h = broadcast(shift);
  const int64_t groups = v.parts.rows, pitch = v.parts.pitch(), width = v.width, bottom = v.rows + v.below;
  const IntVec<T> inside = lane_numbers<T>() < typename IntOf<sizeof(T)>::type(kNarrow ? width : lanes);
  // Rows up to where whole vectors may be read, and the groups that have no others.
  const int64_t whole = kNarrow ? v.readable < lanes ? 0 : (v.readable - lanes) / width + 1 : bottom;
  const int64_t full = ((whole < bottom ? whole : bottom) - F::kReach) / F::kRows;
  const int64_t easy = full < groups ? full : groups;
  for (int64_t column = 0; column < width; column += lanes) {
    // The last vector of a row ends with the row.
    const int64_t at = kNarrow || column + lanes <= width ? column : width - lanes;
    const auto value_of = [&](Vec<T> u) {
      Vec<T> value, slope;
      activate<T, A>(u * s + h, leak, value, slope);
      return kNarrow ? (inside ? value : Vec<T>{}) : value;
    };
    const auto row = [&](int64_t y) {
      const T* p = x + y * width + at;
      return value_of(kNarrow ? load_partial(p, int(width)) : load(p));
    };
    Vec<T> d[F::kRows + 2 * F::kReach];
    if constexpr (F::kReach) {
      d[4] = v.above > 0 ? row(-1) : Vec<T>{};
      d[5] = row(0);
    }
    T* out = to + at;
    const auto finish = [&] {
      Vec<T> t[F::kParts];
      F::analyse(d, t);
#pragma GCC unroll 6
      for (int k = 0; k < F::kParts; k++) store(out + k * stride, t[k]);
      if constexpr (F::kReach) {
        d[0] = d[4];
        d[1] = d[5];
      }
      out += pitch;
    };
    if constexpr (F::kReach) {
      d[0] = d[4];
      d[1] = d[5];
    }
    int64_t g = 0;
    for (const T* p = x + F::kReach * width + at; g < easy; g++, p += F::kRows * width) {
#pragma GCC unroll 4
      for (int r = 0; r < F::kRows; r++) d[r + 2 * F::kReach] = value_of(load(p + r * width));
      finish();
    }
    for (; g < groups; g++) {
#pragma GCC unroll 4
      for (int r = 0; r < F::kRows; r++) {
        const int64_t y = F::kRows * g + r + F::kReach;
        d[r + 2 * F::kReach] = y < bottom ? row(y) : Vec<T>{};
      }
      finish();
    }
  }
}

}  // namespace

template <class T>
void clear_padding(const Tile& tile, int64_t channels, T* to) {
  const View v(tile);
  const FlatPlane& f = v.parts;
  const int64_t count = channels * form_of(tile.flat.radius).parts, rows = v.images * f.rows;
  for (int64_t plane = 0; plane < count; plane++, to += f.length()) {
    fill_zero(to - f.origin(), f.origin());
    for (int64_t r = 0; r < (f.radius ? rows : 0); r++) to[r * f.pitch() + v.width] = T(0);
    fill_zero(to + f.span(), f.length() - f.origin() - f.span());
  }
}

template <class T>
void gather(const Tile& tile, Planes<const T> from, int64_t channels, const T* scale, const T* shift,
            Activation activation, T* to) {
  const View v(tile);
  const FlatPlane& f = v.parts;
  const int64_t length = f.length();
  dispatch_form(tile, [&]<class F>() {
    const T leak = T(activation.leak);
    dispatch_activation(activation.kind, [&]<ActivationKind A>() {
      for (int64_t c = 0; c < channels; c++, to += F::kParts * length) {
        const T s = entry(scale, c, T(1)), h = entry(shift, c, T(0));
        for (int64_t i = 0; i < v.images; i++)
          if (v.width < kLanes<T>)
            gather_plane<T, F, A, true>(v, v.plane(from, i, c), s, h, leak, to + i * f.image(), length);
          else
            gather_plane<T, F, A, false>(v, v.plane(from, i, c), s, h, leak, to + i * f.image(), length);
      }
    });
  });
}

template <class T>
void scatter(const Tile& tile, Parts<const T> products, int64_t channels, const T* shift, Planes<T> to) {
  constexpr int64_t lanes = kLanes<T>;
  const View v(tile);
  const int64_t pitch = v.parts.pitch(), width = v.width, pixels = v.rows * width;
  dispatch_form(tile, [&]<class F>() {
    for (int64_t c = 0; c < channels; c++) {
      const Vec<T> h = broadcast(entry(shift, c, T(0)));
      for (int64_t i = 0; i < v.images; i++) {
        const T* from = products.data + c * products.channel + i * v.parts.image();
        T* out = v.plane(to, i, c);
        for (int64_t g = 0; g < v.parts.rows; g++)
          for (int64_t column = 0; column < width; column += lanes) {
            const int64_t at = column + lanes <= width ? column : width >= lanes ? width - lanes : 0;
            Vec<T> m[F::kParts], y[F::kRows];
#pragma GCC unroll 6
            for (int k = 0; k < F::kParts; k++) m[k] = load(from + k * products.part + g * pitch + at);
            F::synthesise(m, y);
#pragma GCC unroll 4
            for (int r = 0; r < F::kRows; r++) {
              const int64_t row = F::kRows * g + r, p = row * width + at;
              if (row >= v.rows) break;
              // A vector longer than a row runs into the next one, which is written later, but not out of the tile.
              if (p + lanes <= pixels)
                store(out + p, y[r] + h);
              else
                store_partial(out + p, y[r] + h, int(pixels - p));
            }
          }
      }
    }
  });
}

namespace {

// body(image, group, column, position in a plane of parts) for every vector of columns, row after row
template <class T, class Body>
DNL_INLINE void for_each_vector(const View& v, Body body) {
  for (int64_t i = 0; i < v.images; i++)
    for (int64_t g = 0; g < v.parts.rows; g++)
      for (int64_t column = 0; column < v.width; column += kLanes<T>)
        body(i, g, column, i * v.parts.image() + g * v.parts.pitch() + column);
}

}  // namespace

template <class T>
void pull(const Tile& tile, Parts<const T> products, int64_t lead, int64_t trail, int64_t channels, Planes<const T> x,
          const T* scale, const T* shift, Activation activation, const T* rate, const T* offset, const T* factor,
          bool accumulate, Parts<T> total, double* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const View v(tile);
  const int64_t pitch = v.parts.pitch(), width = v.width, groups = v.parts.rows;
  const int64_t tail = (v.images - 1) * v.parts.image() + (groups - 1) * pitch;  // the last row of planes of parts
  dispatch_form(tile, [&]<class F>() {
    const T leak = T(activation.leak);
    dispatch_activation(activation.kind, [&]<ActivationKind A>() {
      for (int64_t c = 0; c < channels; c++) {
        const Vec<T> s = broadcast(entry(scale, c, T(1))), h = broadcast(entry(shift, c, T(0)));
        const Vec<T> r1 = broadcast(entry(rate, c, T(1))), r0 = broadcast(entry(offset, c, T(0)));
        const Vec<T> w = broadcast(entry(factor, c, T(1)));
        Vec<T> plain{}, moment{};
        for_each_vector<T>(v, [&](int64_t image, int64_t g, int64_t column, int64_t position) {
          const int left = int(width - column < lanes ? width - column : lanes);
          // The last vector of a row ends with the row, where it is as long: its first lanes have been done.
          const bool narrow = width < lanes;
          const int64_t done = narrow ? 0 : lanes - left;
          column -= done;
          position -= done;
          const IntVec<T> lane = lane_numbers<T>();
          const IntVec<T> inside = narrow ? lane < typename IntOf<sizeof(T)>::type(left)
                                          : lane >= typename IntOf<sizeof(T)>::type(done);
          const T* from = products.data + c * products.channel + position;
          T* to = total.data + c * total.channel + position;
          const T* pixels = v.plane(x, image, c);
          Vec<T> m[F::kParts], d[F::kRows], before{}, after{};
#pragma GCC unroll 6
          for (int k = 0; k < F::kParts; k++) m[k] = load(from + k * products.part);
          if constexpr (F::kReach) {
            if (g + lead > 0) before = load(from + 5 * products.part - pitch);
            if (g + 1 < groups + trail) after = load(from + pitch);
          }
          F::gather_back(m, before, after, d);
          const int64_t first = F::kRows * g;
          // kEdge: some lanes or rows are not wanted. kNarrow: a row is shorter than a vector.
          const auto rows = [&]<bool kEdge, bool kNarrow>() {
            Vec<T> group_plain{}, group_moment{};
#pragma GCC unroll 4
            for (int r = 0; r < F::kRows; r++) {
              if (kEdge && first + r >= v.rows) break;
              const T* p = pixels + (first + r) * width + column;
              Vec<T> u{}, value, slope, q = d[r];
              if (A != ActivationKind::identity || sums) u = kNarrow ? load_partial(p, left) : load(p);
              activate<T, A>(u * s + h, leak, value, slope);
              if constexpr (A == ActivationKind::relu)
                q = u * s + h > Vec<T>{} ? q : Vec<T>{};
              else if constexpr (A != ActivationKind::identity)
                q *= slope;
              if constexpr (kEdge) q = inside ? q : Vec<T>{};
              group_plain += q;
              group_moment += q * (u * r1 + r0);
              T* out = to + r * total.part;
              // Lanes past a short row's end add nothing to the next row, or are written before it; a tile ends there.
              if (kNarrow && position >= tail)
                store_partial(out, accumulate ? load_partial(out, left) + q * w : q * w, left);
              else if (kNarrow || !kEdge)
                store(out, accumulate ? load(out) + q * w : q * w);
              else
                store(out, accumulate ? load(out) + q * w : inside ? q * w : load(out));
            }
            plain += group_plain;
            moment += group_moment;
          };
          if (left == lanes && first + F::kRows <= v.rows)
            rows.template operator()<false, false>();
          else if (narrow)
            rows.template operator()<true, true>();
          else
            rows.template operator()<true, false>();
        });
        if (sums) {
          sums[2 * c] += sum_lanes<T>(plain);
          sums[2 * c + 1] += sum_lanes<T>(moment);
        }
      }
    });
  });
}

template <class T>
void through(const Tile& tile, int64_t channels, Planes<const T> y, Planes<const T> dout, const T* scale,
             const T* shift, Activation activation, const T* rate, const T* offset, Parts<T> total, double* sums) {
  const View v(tile);
  dispatch_form(tile, [&]<class F>() {
    const T leak = T(activation.leak);
    dispatch_activation(activation.kind, [&]<ActivationKind A>() {
      for (int64_t c = 0; c < channels; c++) {
        const Vec<T> s = broadcast(entry(scale, c, T(1))), h = broadcast(entry(shift, c, T(0)));
        const Vec<T> r1 = broadcast(entry(rate, c, T(1))), r0 = broadcast(entry(offset, c, T(0)));
        Vec<T> plain{}, moment{};
        for_each_vector<T>(v, [&](int64_t image, int64_t g, int64_t column, int64_t position) {
          const int left = int(v.width - column < kLanes<T> ? v.width - column : kLanes<T>);
          for (int r = 0; r < F::kRows && F::kRows * g + r < v.rows; r++) {
            const int64_t p = (F::kRows * g + r) * v.width + column;
            T* out = total.data + c * total.channel + r * total.part + position;
            Vec<T> value, slope;
            const Vec<T> u = load_partial(v.plane(y, image, c) + p, left) * r1 + r0;
            activate<T, A>(u * s + h, leak, value, slope);
            Vec<T> q = load_partial(out, left) + load_partial(v.plane(dout, image, c) + p, left);
            q = first_lanes<T>(q * slope, left);
            plain += q;
            moment += q * u;
            store_partial(out, q, left);
          }
        });
        sums[2 * c] += sum_lanes<T>(plain);
        sums[2 * c + 1] += sum_lanes<T>(moment);
      }
    });
  });
}

template <class T>
void correct(const Tile& tile, int64_t channels, const T* a, const T* b, const T* c, const T* m, Planes<const T> x,
             Planes<const T> dout, Parts<T> total, Planes<T> to, double* sums) {
  const View v(tile);
  const FlatPlane& f = v.parts;
  dispatch_form(tile, [&]<class F>() {
    for (int64_t k = 0; k < channels; k++) {
      const Vec<T> ak = broadcast(a[k]), bk = broadcast(b[k]), ck = broadcast(c[k]), mk = broadcast(m[k]);
      T* const planes = total.data + k * total.channel;
      Vec<T> sum{};
      for_each_vector<T>(v, [&](int64_t image, int64_t g, int64_t column, int64_t position) {
        const int left = int(v.width - column < kLanes<T> ? v.width - column : kLanes<T>);
        const int64_t first = F::kRows * g * v.width + column;
        const auto group = [&]<bool kEdge>() {  // as in `pull`
          Vec<T> q[F::kRows] = {}, t[F::kParts];
          const auto read = [&](const T* p) { return kEdge ? load_partial(p, left) : load(p); };
#pragma GCC unroll 4
          for (int r = 0; r < F::kRows; r++) {
            if (kEdge && F::kRows * g + r >= v.rows) break;
            const int64_t p = first + r * v.width;
            q[r] = ak * load(planes + r * total.part + position) + ck;
            if (x.data) q[r] += bk * (read(v.plane(x, image, k) + p) - mk);
            if (dout.data) q[r] += read(v.plane(dout, image, k) + p);
            if constexpr (kEdge) q[r] = first_lanes<T>(q[r], left);
            sum += q[r];
            if (to.data) store_partial(v.plane(to, image, k) + p, q[r], left);
          }
          if (to.data) return;
          F::spread(q, t);
#pragma GCC unroll 6
          for (int j = 0; j < F::kParts; j++) {
            T* out = planes + j * total.part + position;
            if constexpr (kEdge)
              store_partial(out, t[j], left);  // the next row is still to be read
            else
              store(out, t[j]);
            if (F::kReach && column + kLanes<T> >= v.width) out[left] = T(0);
          }
        };
        if (left == kLanes<T> && F::kRows * (g + 1) <= v.rows)
          group.template operator()<false>();
        else
          group.template operator()<true>();
      });
      if (sums) sums[k] += sum_lanes<T>(sum);
      if (to.data) continue;
      for (int j = 0; j < F::kParts; j++) {
        T* plane = planes + j * total.part;
        if (v.above == 0 || !F::kReach) fill_zero(plane - f.origin(), F::kReach ? f.origin() : 0);
        if (v.below == 0) fill_zero(plane + f.span(), (f.span() + kPlaneAlign - 1) / kPlaneAlign * kPlaneAlign - f.span() + F::kReach);
      }
    }
  });
}

#define DNL_INSTANTIATE(T)                                                                                             \
  template void clear_padding<T>(const Tile&, int64_t, T*);                                                            \
  template void gather<T>(const Tile&, Planes<const T>, int64_t, const T*, const T*, Activation, T*);                  \
  template void scatter<T>(const Tile&, Parts<const T>, int64_t, const T*, Planes<T>);                                 \
  template void pull<T>(const Tile&, Parts<const T>, int64_t, int64_t, int64_t, Planes<const T>, const T*, const T*,   \
                        Activation, const T*, const T*, const T*, bool, Parts<T>, double*);                            \
  template void through<T>(const Tile&, int64_t, Planes<const T>, Planes<const T>, const T*, const T*, Activation,     \
                           const T*, const T*, Parts<T>, double*);                                                     \
  template void correct<T>(const Tile&, int64_t, const T*, const T*, const T*, const T*, Planes<const T>,              \
                           Planes<const T>, Parts<T>, Planes<T>, double*);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
