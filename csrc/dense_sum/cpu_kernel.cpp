// Loops of dense_sum. A range of the flattened tensor is cut where the channel changes, so that the weight of each
// state is one number per run; short channels-last rows are handled by the same code with runs of one element.
#include "common/vec.h"
#include "dense_sum/params.h"

namespace dnl::DNL_ISA {
namespace {

constexpr int64_t kTile = 1024;  // elements of y kept in the first-level cache while all states pass by

struct Run {
  int64_t begin, end, channel;
};

// Calls body(run) for each maximal run of [begin, end) that lies in one channel.
template <class Body>
DNL_INLINE void for_each_run(const DenseSumParams& p, int64_t begin, int64_t end, Body body) {
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / p.inner, stop = (row + 1) * p.inner;
    const Run run{i, stop < end ? stop : end, row % p.channels};
    body(run);
    i = run.end;
  }
}

template <class T>
DNL_INLINE void add_scaled(T* y, const T* x, T w, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(y + i, load(y + i) + load(x + i) * broadcast(w));
  for (; i < n; i++) y[i] += x[i] * w;
}

template <class T>
DNL_INLINE T dot(const T* a, const T* b, int64_t n) {
  Vec<T> s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes<T>) * load(b + i + kLanes<T>);
  }
  T s = sum_lanes<T>(s0 + s1);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

}  // namespace

template <class T>
void dense_sum_fwd(const DenseSumParams& p, T* y, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(p.weight);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = tile + kTile < end ? tile + kTile : end;
    memset(y + tile, 0, (stop - tile) * sizeof(T));
    for (int64_t j = 0; j < p.count; j++) {
      const T* x = static_cast<const T*>(p.states[j]);
      if (p.inner == 1) {
        // Channels last: the weights themselves run along the vector lanes.
        for (int64_t i = tile; i < stop;) {
          const int64_t c = i % p.channels, n = p.channels - c < stop - i ? p.channels - c : stop - i;
          const T* wc = w + j * p.channels + c;
          int64_t k = 0;
          for (; k + kLanes<T> <= n; k += kLanes<T>)
            store(y + i + k, load(y + i + k) + load(x + i + k) * load(wc + k));
          for (; k < n; k++) y[i + k] += x[i + k] * wc[k];
          i += n;
        }
      } else {
        for_each_run(p, tile, stop, [&](Run r) {
          add_scaled(y + r.begin, x + r.begin, w[j * p.channels + r.channel], r.end - r.begin);
        });
      }
    }
  }
}

template <class T>
void dense_sum_bwd_states(const DenseSumParams& p, const T* dy, T* const* dstates, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(p.weight);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = tile + kTile < end ? tile + kTile : end;
    for (int64_t j = 0; j < p.count; j++)
      for_each_run(p, tile, stop, [&](Run r) {
        const T scale = w[j * p.channels + r.channel];
        int64_t i = r.begin;
        for (; i + kLanes<T> <= r.end; i += kLanes<T>) store(dstates[j] + i, load(dy + i) * broadcast(scale));
        for (; i < r.end; i++) dstates[j][i] = dy[i] * scale;
      });
  }
}

template <class T>
void dense_sum_bwd_weight(const DenseSumParams& p, const T* dy, T* partial, int64_t begin, int64_t end) {
  memset(partial, 0, p.count * p.channels * sizeof(T));
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = tile + kTile < end ? tile + kTile : end;
    for (int64_t j = 0; j < p.count; j++) {
      const T* x = static_cast<const T*>(p.states[j]);
      for_each_run(p, tile, stop, [&](Run r) {
        partial[j * p.channels + r.channel] += dot(dy + r.begin, x + r.begin, r.end - r.begin);
      });
    }
  }
}

#define DNL_INSTANTIATE(T)                                                                         \
  template void dense_sum_fwd<T>(const DenseSumParams&, T*, int64_t, int64_t);                      \
  template void dense_sum_bwd_states<T>(const DenseSumParams&, const T*, T* const*, int64_t, int64_t); \
  template void dense_sum_bwd_weight<T>(const DenseSumParams&, const T*, T*, int64_t, int64_t);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
