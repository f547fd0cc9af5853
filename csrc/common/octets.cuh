// Matrices of a half type in shared memory and products of 16x16 tiles on tensor cores.
//
// A matrix is kept as octets of channels, [octet][row][8]: any 8 consecutive rows of an octet are 128 consecutive bytes,
// so ldmatrix reads them without a bank conflict, either way round. A tile of float sums is spread over a warp as mma.sync
// leaves it: d[o][e] of lane l is row l / 4 + 8 (e / 2), column 8 o + 2 (l % 4) + e % 2.
#pragma once
#include "common/device.cuh"

namespace dnl {

using TileSums = float[2][4];

DNL_DEVICE int tile_row(int e) { return static_cast<int>(threadIdx.x) % 32 / 4 + e / 2 * 8; }
DNL_DEVICE int tile_column(int octet, int e) { return octet * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2; }

template <class T>
struct Octets {
  T* data;
  int rows;

  DNL_DEVICE T* at(int row, int channel) const { return data + (channel / 8 * rows + row) * 8 + channel % 8; }

  // Operands of mma.sync from the tile of 16 rows and 16 channels that begins there: a left one whose rows are the
  // matrix's (transposed: its channels), a right one whose rows, the k of the product, are the matrix's (transposed: its
  // channels) as two octets of columns, {b[0], b[1]} and {b[2], b[3]}.
  DNL_DEVICE void left(uint32_t (&a)[4], int row, int channel) const { ldmatrix(a, rows_first(row, channel)); }
  DNL_DEVICE void left_transposed(uint32_t (&a)[4], int row, int channel) const {
    ldmatrix<4, true>(a, channels_first(row, channel));
  }
  DNL_DEVICE void right(uint32_t (&b)[4], int row, int channel) const {
    ldmatrix<4, true>(b, rows_first(row, channel));
  }
  DNL_DEVICE void right_transposed(uint32_t (&b)[4], int row, int channel) const {
    ldmatrix(b, channels_first(row, channel));
  }

  // Two neighbouring channels of a row.
  DNL_DEVICE float2 pair(int row, int channel) const {
    return unpack<T>(*reinterpret_cast<const uint32_t*>(at(row, channel)));
  }
  // A tile of sums, rounded; zeros from row `end` on.
  DNL_DEVICE void put(int row, int channel, const TileSums& d, int end) const {
#pragma unroll
    for (int o = 0; o < 2; o++)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int r = row + tile_row(e);
        *reinterpret_cast<uint32_t*>(at(r, channel + tile_column(o, e))) = r < end ? pack<T>(d[o][e], d[o][e + 1]) : 0;
      }
  }

 private:
  // The row of 8 elements whose address this lane gives: of the tile's four 8x8 matrices in either order.
  DNL_DEVICE const T* rows_first(int row, int channel) const {
    const int lane = threadIdx.x % 32;
    return at(row + lane % 16, channel + lane / 16 * 8);
  }
  DNL_DEVICE const T* channels_first(int row, int channel) const {
    const int lane = threadIdx.x % 32;
    return at(row + lane / 16 * 8 + lane % 8, channel + lane / 8 % 2 * 8);
  }
};

template <class T>
DNL_DEVICE void multiply(TileSums& d, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_m16n8k16<T>(d[0], a, b[0], b[1]);
  mma_m16n8k16<T>(d[1], a, b[2], b[3]);
}

DNL_DEVICE void clear(TileSums& d) {
#pragma unroll
  for (int i = 0; i < 8; i++) d[i / 4][i % 4] = 0;
}

// A tile of sums, rounded, as the left operand of the next product.
template <class T>
DNL_DEVICE void as_left(uint32_t (&a)[4], const TileSums& d) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = pack<T>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
}

// Left operands from rows of floats [channel][position], `stride` apart, rounded; zeros from channel `count` on. The
// operand's rows are positions, or channels. A stride that is an odd multiple of 4 keeps the first free of conflicts.
template <class T>
DNL_DEVICE void left_of_positions(uint32_t (&a)[4], const float* rows, int stride, int position, int channel, int count) {
  const auto value = [&](int c, int n) { return c < count ? rows[c * stride + n] : 0.0f; };
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int c = channel + tile_column(i / 2, 0), n = position + tile_row(i % 2 * 2);
    a[i] = pack<T>(value(c, n), value(c + 1, n));
  }
}
template <class T>
DNL_DEVICE void left_of_channels(uint32_t (&a)[4], const float* rows, int stride, int channel, int position, int count) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int c = channel + tile_row(i % 2 * 2), n = position + tile_column(i / 2, 0);
    const float2 v = c < count ? *reinterpret_cast<const float2*>(rows + c * stride + n) : make_float2(0, 0);
    a[i] = pack<T>(v.x, v.y);
  }
}

}  // namespace dnl
