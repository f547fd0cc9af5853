// Products of matrices with packed weights: C[m, o] (+)= sum_k A[m, k] W[k, o] in register tiles of rows x vectors of
// outputs. Every step reads some vectors of weights and broadcasts one number of each row: no dependence on how the rows
// lie in memory, no sums across lanes. Included by cpu_kernel files only.
#pragma once
#include "common/math.h"
#include "common/vec.h"

namespace dnl::DNL_ISA {

constexpr int kOutputBlock = 16;  // packed weights are [outputs / 16][K][16], whatever the level's vectors

#if defined(__AVX512F__)
constexpr int kProductVectors = 4, kProductRegisters = 32;
#else
constexpr int kProductVectors = 2, kProductRegisters = 16;
#endif
// Rows of a tile of n vectors: with the weights and one broadcast number they fill the registers.
constexpr int product_rows(int vectors) {
  const int rows = (kProductRegisters - 1 - vectors) / vectors;
  return rows < 14 ? rows : 14;
}

// Lines of memory that whoever comes next will read: one for every step of a tile's loop.
struct Stream {
  const char* line;
  int64_t step;  // bytes
};

// K = outer * inner; number (m, k) of A is a[k / inner * outer_step + k % inner * KS + m * MS], KS and MS template
// arguments below.
template <class T>
struct Product {
  const T* a;
  int64_t outer, outer_step, inner;
  const T* weight;      // [blocks][outer * inner][kOutputBlock]
  int64_t block_step;   // from one block of outputs to the next
  T* c;                 // number o of row m at c[rows[m] + o]
  const int64_t* rows;
  const T* bias;        // of the outputs; nullptr: 0
  bool accumulate;      // C += instead of C = bias +
  T floor;              // numbers below it become it: relu's 0, or -inf
  const Stream* ahead = nullptr;  // each is fetched into the second cache by a tile
  int64_t streams = 0;
};

template <class T, int M, int N, int KS, int MS>
void product_tile(const Product<T>& p, int64_t row, int64_t vector, Stream ahead) {
  constexpr int kPerBlock = kOutputBlock / kLanes<T>;
  const T* w[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; j++)
    w[j] = p.weight + (vector + j) / kPerBlock * p.block_step + (vector + j) % kPerBlock * kLanes<T>;
  const int64_t* rows = p.rows + row;
  T* c = p.c + vector * kLanes<T>;
  // What was there before is added last: as the first of the terms it would make each of them round to its own size.
  Vec<T> sum[M][N] = {};
  const T* from = p.a + row * MS;
  int64_t at = 0;
  for (int64_t o = 0; o < p.outer; o++, from += p.outer_step) {
    const T* a = from;
    for (int64_t k = 0; k < p.inner; k++, a += KS, at += kOutputBlock, ahead.line += ahead.step) {
      __builtin_prefetch(ahead.line, 0, 2);
      Vec<T> v[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        v[j] = load(w[j] + at);
        DNL_IN_REGISTER(v[j]);
      }
#pragma GCC unroll 14
      for (int m = 0; m < M; m++) {
        const Vec<T> x = broadcast(a[m * MS]);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) sum[m][j] += x * v[j];
      }
    }
  }
  const Vec<T> floor = broadcast(p.floor);
  const auto finish = [&](auto before) {
#pragma GCC unroll 14
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        T* const to = c + rows[m] + j * kLanes<T>;
        store(to, maximum(floor, before(to, j) + sum[m][j]));
      }
  };
  if (p.accumulate) finish([](const T* to, int) { return load(to); });
  else if (p.bias) finish([&](const T*, int j) { return load(p.bias + (vector + j) * kLanes<T>); });
  else finish([](const T*, int) { return Vec<T>{}; });
}

// The tiles of N vectors with 1 .. product_rows(N) rows.
template <class T, int N, int KS, int MS>
struct ProductTiles {
  using Tile = void (*)(const Product<T>&, int64_t, int64_t, Stream);
  Tile tile[product_rows(N) + 1];

  constexpr ProductTiles() : tile{} { fill<product_rows(N)>(); }

 private:
  template <int M>
  constexpr void fill() {
    tile[M] = product_tile<T, M, N, KS, MS>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

template <class T, int N, int KS, int MS>
DNL_INLINE void product_column(const Product<T>& p, int64_t rows, int64_t vector, int64_t& streams) {
  static constexpr ProductTiles<T, N, KS, MS> tiles;
  const int64_t pieces = (rows + product_rows(N) - 1) / product_rows(N);
  for (int64_t i = 0; i < pieces; i++) {
    const int64_t first = i * rows / pieces;
    const Stream ahead = streams < p.streams ? p.ahead[streams++] : Stream{reinterpret_cast<const char*>(p.a), 0};
    tiles.tile[(i + 1) * rows / pieces - first](p, first, vector, ahead);
  }
}

// All rows, blocks of outputs [begin, end): tiles as equal as can be, so that none is too small to hide latencies.
template <class T, int KS, int MS>
void product(const Product<T>& p, int64_t rows, int64_t begin, int64_t end) {
  constexpr int kPerBlock = kOutputBlock / kLanes<T>;
  const int64_t vectors = (end - begin) * kPerBlock, groups = (vectors + kProductVectors - 1) / kProductVectors;
  int64_t streams = 0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = g * vectors / groups, count = (g + 1) * vectors / groups - first;
    const int64_t vector = begin * kPerBlock + first;
    if (count == 1) product_column<T, 1, KS, MS>(p, rows, vector, streams);
    if (count == 2) product_column<T, 2, KS, MS>(p, rows, vector, streams);
    if constexpr (kProductVectors > 2) {
      if (count == 3) product_column<T, 3, KS, MS>(p, rows, vector, streams);
      if (count == 4) product_column<T, 4, KS, MS>(p, rows, vector, streams);
    }
  }
}

}  // namespace dnl::DNL_ISA
