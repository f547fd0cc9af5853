// Convolutions of many channels in Winograd's form, over the loops of common/winograd.h: forward, or backward with the
// filters turned around, and the gradient of the filters. Included by cpu.cpp files.
#pragma once
#include <algorithm>
#include <vector>

#include "common/conv_host.h"
#include "common/winograd.h"

namespace dnl {

// Whether a 3 x 3 convolution gains by it: the transforms of few channels cost as much as the products that they save.
inline bool is_wide(int64_t size, int64_t channels, int64_t outputs) {
  return size == 3 && channels >= 16 && outputs >= 16;
}

// Channels that lie side by side, and what stands between them and their filters.
template <class T>
struct WideInput {
  Planes<const T> planes;  // of image 0
  int64_t channels;
  const T *scale, *shift;  // nullptr: 1 and 0
  Activation activation;
};

template <class T>
int64_t channels_of(const std::vector<WideInput<T>>& inputs) {
  int64_t n = 0;
  for (const WideInput<T>& in : inputs) n += in.channels;
  return n;
}

// The transformed filters [products][channels][outputs] of weight [outputs, channels, 3, 3], times `factor`; backward:
// those of the transposed convolution, [products][outputs][channels] for channels [first, first + count).
template <class T>
std::vector<T> wide_filters(const T* weight, int64_t outputs, int64_t channels, double factor) {
  std::vector<T> found(kProducts * outputs * channels);
  parallel_tasks(0, channels, 4, [&](int64_t begin, int64_t end) {
    DNL_ISA_CALL(winograd_filters<T>(weight, channels * 9, 9, false, factor, outputs, channels, begin, end,
                                     found.data()));
  });
  return found;
}
template <class T>
std::vector<T> wide_filters_back(const T* weight, int64_t outputs, int64_t channels, int64_t first, int64_t count,
                                 double factor) {
  std::vector<T> found(kProducts * outputs * count);
  parallel_tasks(0, outputs, 4, [&](int64_t begin, int64_t end) {
    DNL_ISA_CALL(winograd_filters<T>(weight + first * 9, 9, channels * 9, true, factor, count, outputs, begin, end,
                                     found.data()));
  });
  return found;
}

// The parts of channels [begin, end) of the inputs side by side.
template <class T>
void gather_wide(const TileRun& run, const std::vector<WideInput<T>>& inputs, int64_t begin, int64_t end,
                 int64_t step, T* parts) {
  int64_t channel = 0;
  for (const WideInput<T>& in : inputs) {
    const int64_t from = std::max(begin, channel), to = std::min(end, channel + in.channels), c = from - channel;
    if (from < to)
      DNL_ISA_CALL(winograd_gather<T>(run, at(in.planes, 0, c), to - from, in.scale ? in.scale + c : nullptr,
                                      in.shift ? in.shift + c : nullptr, in.activation, step,
                                      parts + (from - begin) * run.pitch));
    channel += in.channels;
  }
}

// finish(run, output, image, y, x, n, row): the n numbers of a row of an output, its pixels from (y, x) on. Calls of a
// run come from one thread, in a fixed order; `runs_of` says how many runs there are.
inline int64_t runs_of(const TileGrid& grid, int64_t length = kRun) { return (grid.count() + length - 1) / length; }

template <class T, class Finish>
void convolve_wide(const TileGrid& grid, const std::vector<WideInput<T>>& inputs, const T* filters, int64_t outputs,
                   Finish finish) {
  constexpr int64_t kBlock = 64;  // outputs whose products stay in cache
  const int64_t channels = channels_of(inputs), runs = runs_of(grid), threads = free_threads();
  // Few runs are shared out by outputs too: no sum depends on it.
  const int64_t wanted = runs < 2 * threads && runs > 0 ? (2 * threads + runs - 1) / runs : 1;
  const int64_t shares = std::max<int64_t>(1, std::min(wanted, outputs / 8));
  const int64_t largest = (outputs + shares - 1) / shares, block = std::min(kBlock, largest);
  const bool keeps = largest > block;  // every block of outputs reads all parts
  const int64_t kept = keeps ? channels : std::min(kDepth, channels);
  const int64_t step = part_step(kept * kRun);
  const int64_t bytes = Scratch::bytes<T>(kProducts * step) + Scratch::bytes<T>(kProducts * part_step(block * kRun)) +
                        Scratch::bytes<T>(8 * kRun);
  parallel_tasks(0, runs * shares, 1, [&](int64_t task, int64_t) {
    Scratch scratch(bytes);
    T* const parts = scratch.take<T>(kProducts * step);
    T* const products = scratch.take<T>(kProducts * part_step(block * kRun));
    T* const rows = scratch.take<T>(8 * kRun);
    const int64_t index = task / shares, share = task % shares;
    const int64_t first = index * kRun, past = (share + 1) * outputs / shares;
    const TileRun run{grid, first, std::min(kRun, grid.count() - first), kRun};
    if (keeps) gather_wide(run, inputs, 0, channels, step, parts);
    for (int64_t o = share * outputs / shares; o < past; o += block) {
      const int64_t n = std::min(block, past - o), apart = part_step(n * kRun);
      if (channels == 0) std::fill(products, products + kProducts * apart, T(0));
      for (int64_t c = 0; c < channels; c += kDepth) {
        const int64_t depth = std::min(kDepth, channels - c);
        if (!keeps) gather_wide(run, inputs, c, c + depth, step, parts);
        for (int64_t p = 0; p < kProducts; p++)
          DNL_ISA_CALL(multiply<T>(n, depth, run.padded(), filters + (p * channels + c) * outputs + o, 1, outputs,
                                   parts + p * step + (keeps ? c : 0) * kRun, kRun, c > 0, products + p * apart, kRun));
      }
      for (int64_t i = 0; i < n; i++) {
        DNL_ISA_CALL(winograd_scatter<T>(run, products + i * kRun, apart, rows));
        run.for_each_row([&](int64_t image, int64_t row, int64_t column, int64_t tiles, int64_t number) {
          const int64_t x = kTileColumns * column, y = kTileRows * row;
          const int64_t length = std::min(kTileColumns * tiles, grid.width - x);
          for (int64_t r = 0; r < std::min(kTileRows, grid.height - y); r++)
            finish(index, o + i, image, y + r, x, length, rows + r * 2 * kRun + kTileColumns * number);
        });
      }
    }
  });
}

// dweight [outputs, channels, 3, 3] = factor * its gradient. Partial sums are of so many runs as depends on the sizes only.
template <class T>
void weight_gradient_wide(const TileGrid& grid, const std::vector<WideInput<T>>& inputs, Planes<const T> dy,
                          int64_t outputs, double factor, T* dweight) {
  constexpr int64_t kRunsAtLeast = 4, kMostChunks = 16;
  const int64_t channels = channels_of(inputs), runs = runs_of(grid, kLongRun), pitch = (outputs + 15) / 16 * 16;
  const int64_t chunks = std::max<int64_t>(1, std::min(kMostChunks, runs / kRunsAtLeast));
  const int64_t size = kProducts * channels * pitch;
  std::vector<T> partial(chunks * size);
  const int64_t step = part_step(kDepth * kLongRun), room_size = kProducts * part_step(16 * kLongRun);
  const int64_t bytes = Scratch::bytes<T>(kProducts * step) + Scratch::bytes<T>(kProducts * pitch * kLongRun) +
                        Scratch::bytes<T>(room_size);
  parallel_chunks(chunks, runs, [&](int64_t chunk, int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    T* const parts = scratch.take<T>(kProducts * step);
    T* const spread = scratch.take<T>(kProducts * pitch * kLongRun);
    T* const room = scratch.take<T>(room_size);
    T* const sums = partial.data() + chunk * size;
    for (int64_t index = begin; index < end; index++) {
      const int64_t first = index * kLongRun;
      const TileRun run{grid, first, std::min(kLongRun, grid.count() - first), kLongRun};
      DNL_ISA_CALL(winograd_spread<T>(run, dy, outputs, pitch, room, spread));
      for (int64_t c = 0; c < channels; c += kDepth) {
        const int64_t depth = std::min(kDepth, channels - c);
        gather_wide(run, inputs, c, c + depth, step, parts);
        for (int64_t p = 0; p < kProducts; p++)
          DNL_ISA_CALL(multiply<T>(depth, run.count, pitch, parts + p * step, kLongRun, 1,
                                   spread + p * kLongRun * pitch, pitch, true, sums + (p * channels + c) * pitch, pitch));
      }
    }
  });
  parallel_tasks(0, channels, 4, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(outputs), found(9 * outputs);
    for (int64_t c = begin; c < end; c++) {
      std::fill(found.begin(), found.end(), 0.0);
      for (int64_t p = 0; p < kProducts; p++) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const T* from = partial.data() + chunk * size + (p * channels + c) * pitch;
          for (int64_t o = 0; o < outputs; o++) sum[o] += from[o];
        }
        for (int64_t t = 0; t < 9; t++) {
          const double rate = factor * kFilterTransform[p / 4][t / 3] * kColumnTransform[p % 4][t % 3];
          for (int64_t o = 0; o < outputs && rate != 0; o++) found[t * outputs + o] += rate * sum[o];
        }
      }
      for (int64_t o = 0; o < outputs; o++)
        for (int64_t t = 0; t < 9; t++) dweight[(o * channels + c) * 9 + t] = static_cast<T>(found[t * outputs + o]);
    }
  });
}

}  // namespace dnl
