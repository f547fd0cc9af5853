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

constexpr int kStates = 8;  // added in registers before the sums are stored

// Elements [begin, end) of B sums. Their weights: of state j and sum b at w[(b * count + j) * channels], one number, or
// (kLast, where channels are the last dimension) as many as there are elements.
template <class T, int B, bool kLast>
void add_run(const DenseSumParams& p, const T* w, T* const* sums, bool accumulate, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t first = 0; first < p.count; first += kStates) {
    const int64_t last = first + kStates < p.count ? first + kStates : p.count;
    const bool more = accumulate || first > 0;
    const auto step = [&]<int V, bool kPart>(int64_t at) {
      const int left = int(end - at);
      const auto read = [&](const T* from) { return kPart ? load_partial(from, left) : load(from); };
      Vec<T> sum[B][V] = {};
#pragma GCC unroll 4
      for (int b = 0; b < B && more; b++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[b][v] = read(sums[b] + at + v * lanes);
      for (int64_t j = first; j < last; j++) {
        const T* x = static_cast<const T*>(p.states[j]) + at;
        Vec<T> in[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) in[v] = read(x + v * lanes);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
          const T* weight = w + (b * p.count + j) * p.channels;
#pragma GCC unroll 2
          for (int v = 0; v < V; v++)
            sum[b][v] += in[v] * (kLast ? read(weight + (at - begin) + v * lanes) : broadcast(*weight));
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < B; b++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++)
          if constexpr (kPart)
            store_partial(sums[b] + at + v * lanes, sum[b][v], left);
          else
            store(sums[b] + at + v * lanes, sum[b][v]);
    };
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) step.template operator()<2, false>(i);
    for (; i + lanes <= end; i += lanes) step.template operator()<1, false>(i);
    if (i < end) step.template operator()<1, true>(i);
  }
}

template <class T, int B>
void add_range(const DenseSumParams& p, T* const* sums, bool accumulate, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(p.weight);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = tile + kTile < end ? tile + kTile : end;
    if (p.inner > 1) {
      for_each_run(p, tile, stop,
                   [&](Run r) { add_run<T, B, false>(p, w + r.channel, sums, accumulate, r.begin, r.end); });
      continue;
    }
    for (int64_t i = tile; i < stop;) {
      const int64_t c = i % p.channels, n = p.channels - c < stop - i ? p.channels - c : stop - i;
      add_run<T, B, true>(p, w + c, sums, accumulate, i, i + n);
      i += n;
    }
  }
}

}  // namespace

template <class T>
void dense_sum_add(const DenseSumParams& p, T* const* sums, int64_t targets, bool accumulate, int64_t begin,
                   int64_t end) {
  switch (targets) {
    case 1: return add_range<T, 1>(p, sums, accumulate, begin, end);
    case 2: return add_range<T, 2>(p, sums, accumulate, begin, end);
    case 3: return add_range<T, 3>(p, sums, accumulate, begin, end);
    case 4: return add_range<T, 4>(p, sums, accumulate, begin, end);
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
  template void dense_sum_add<T>(const DenseSumParams&, T* const*, int64_t, bool, int64_t, int64_t); \
  template void dense_sum_bwd_states<T>(const DenseSumParams&, const T*, T* const*, int64_t, int64_t); \
  template void dense_sum_bwd_weight<T>(const DenseSumParams&, const T*, T*, int64_t, int64_t);
DNL_INSTANTIATE(float)
DNL_INSTANTIATE(double)

}  // namespace dnl::DNL_ISA
