// 3 x 3 convolutions in Winograd's form F(4 x 2, 3 x 3), for layers of many channels: rows of tiles of 4 x 2 outputs,
// each from 6 x 4 inputs, by 24 products for every pair of channels where the direct form takes 72.
//
// y = A^T ((G w H^T) .* (B^T d C)) along the rows at the points 0, +-3/4, +-3/2, infinity, along the columns at 0, +-1,
// infinity. Its products are 24 matrix products [outputs, channels] x [channels, tiles], made of `kRun` tiles at a time,
// which stay in cache; sums over channels are cut into pieces of kDepth, as those of a direct convolution are. Errors in
// float32 are then 1.1 to 1.8 times those of eager's direct convolution (root mean square, 64 to 192 channels, against
// float64). F(2 x 2) has 0.7 to 1.1 times, at 32 products for the same outputs; F(4 x 4), at 18, has 1.8 to 3.0 times
// with the best points found, which is more than the tests' budget of 2, and is not used.
//
// Tiles are numbered by image, row and column. Vector lanes run over tiles, so that small images fill them too; a tile
// takes what lies outside its image as zero, never from a neighbour in the numbering.
#pragma once
#include <cstdint>

#include "common/conv.h"

namespace dnl {

// G, whose row j belongs to point j.
constexpr double kFilterTransform[6][3] = {
    {64. / 81, 0, 0},
    {-128. / 243, -32. / 81, -8. / 27},
    {-128. / 243, 32. / 81, -8. / 27},
    {32. / 243, 16. / 81, 8. / 27},
    {32. / 243, -16. / 81, 8. / 27},
    {0, 0, 1},
};
// H, likewise.
constexpr double kColumnTransform[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

constexpr int64_t kTileRows = 4, kTileColumns = 2, kProducts = 24;
constexpr int64_t kRun = 48;      // tiles at a time: whole vectors of every level and type, three of AVX-512 in float
constexpr int64_t kLongRun = 96;  // where the sum runs over tiles
constexpr int64_t kDepth = 32;    // channels of a partial sum

// From one part of so many numbers to the next: all parts of a tile are written together, and in memory a multiple of
// 4 KiB apart they would share a few places of the first-level cache.
constexpr int64_t part_step(int64_t numbers) { return numbers + 16; }

struct TileGrid {
  int64_t batch, height, width;

  int64_t rows() const { return (height + kTileRows - 1) / kTileRows; }
  int64_t columns() const { return (width + kTileColumns - 1) / kTileColumns; }
  int64_t count() const { return batch * rows() * columns(); }
};

// Tiles [first, first + count). Arrays over tiles have `pitch` entries; those in [count, padded) are written too, and
// mean nothing.
struct TileRun {
  TileGrid grid;
  int64_t first, count, pitch;

  int64_t padded() const { return (count + 15) / 16 * 16; }  // whole vectors of every level

  // Calls body(image, row of tiles, first column, columns, number of the first one in the run) for every row of tiles.
  template <class Body>
  void for_each_row(Body body) const {
    const int64_t columns = grid.columns(), rows = grid.rows();
    for (int64_t at = 0; at < count;) {
      const int64_t tile = first + at, row = tile / columns, column = tile % columns;
      const int64_t n = columns - column < count - at ? columns - column : count - at;
      body(row / rows, row % rows, column, n, at);
      at += n;
    }
  }
};

#define DNL_DECLARE_WINOGRAD(LEVEL)                                                                                    \
  namespace LEVEL {                                                                                                    \
  /* filters[p, c, o] = factor * (G w_oc H^T)_p, w_oc at weight + o * output_stride + c * channel_stride; mirrored: */ \
  /* of the filter turned by 180 degrees. For c in [begin, end). */                                                    \
  template <class T>                                                                                                   \
  void winograd_filters(const T* weight, int64_t output_stride, int64_t channel_stride, bool mirrored, double factor,  \
                        int64_t outputs, int64_t channels, int64_t begin, int64_t end, T* filters);                    \
  /* parts[p, c, tile] = (B^T d C)_p, d = act(scale_c * from + shift_c) inside the image and 0 outside; */         \
  /* `step` from part to part */                                                                                       \
  template <class T>                                                                                                   \
  void winograd_gather(const TileRun&, Planes<const T> from, int64_t channels, const T* scale, const T* shift,         \
                       Activation, int64_t step, T* parts);                                                            \
  /* rows[y, x]: the 4 rows, 2 * pitch long, of one output from its products[p, o, tile], `step` apart in p */          \
  template <class T>                                                                                                   \
  void winograd_scatter(const TileRun&, const T* products, int64_t step, T* rows);                                     \
  /* parts[p, tile, o] = (A dy)_p for the tiles' own 4 x 2 pixels, 0 behind the last output; `room`: part_step(16 * pitch) */ \
  /* numbers for each of kProducts, aligned */                                                                         \
  template <class T>                                                                                                   \
  void winograd_spread(const TileRun&, Planes<const T> dy, int64_t outputs, int64_t output_pitch, T* room, T* parts);  \
  /* to[i, j] (+)= sum_k a[i * a_row + k * a_step] * b[k * b_step + j], columns a multiple of 16 */                    \
  template <class T>                                                                                                   \
  void multiply(int64_t rows, int64_t depth, int64_t columns, const T* a, int64_t a_row, int64_t a_step, const T* b,   \
                int64_t b_step, bool accumulate, T* to, int64_t to_row);                                               \
  }
DNL_FOR_EACH_ISA(DNL_DECLARE_WINOGRAD)

}  // namespace dnl
