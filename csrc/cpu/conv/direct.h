// Direct convolution: rows of what pixels read, times the weight.
#pragma once

#include "gather.h"
#include "product.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// Rows of a panel are then no multiple of 4 KiB apart, and long enough for the last tile.
using fastmeta::conv::kGap;
using fastmeta::conv::kPanelBytes;

// One of the products that a convolution adds up: images, and a weight [depth, cols].
template <class T>
struct Operand {
  const T* images;
  const T* weight;
};

// C = or += A B [rows of c, cols] for a tile of A.
template <bool Add, class T>
void multiply_columns(const T* a, int64_t pitch, const T* b, int cols, int depth, T* const* c,
                      int live) {
  T* at[kTileRows];
  int j = 0;
  const auto columns = [&] {
    for (int i = 0; i < live; ++i) at[i] = c[i] + j;
  };
  for (; j + 2 * lanes<T> <= cols; j += 2 * lanes<T>) {
    columns();
    multiply_tile<Add, 2>(a, pitch, b + j, cols, depth, at, live);
  }
  for (; j < cols; j += lanes<T>) {
    columns();
    multiply_tile<Add, 1>(a, pitch, b + j, cols, depth, at, live);
  }
}

// out = the convolution over a grid, summed over operands; `then(rows, live)` after each tile of
// pixels, while they are close.
template <class T, class Then>
void convolve(const Grid& grid, int64_t examples, Images<const T> in, const Operand<T>* operands,
              int count, Images<T> out, T* panel, Then then) {
  const int depth = int(grid.taps.size()) * in.channels, cols = out.channels;
  const int64_t pitch = depth + kGap, pixels = examples * grid.rows * grid.cols;
  for (int64_t first = 0; first < pixels; first += kTileRows) {
    const int live = pixels - first < kTileRows ? int(pixels - first) : kTileRows;
    T* rows[kTileRows];
    for (int o = 0; o < count; ++o) {
      in.data = operands[o].images;
      gather(grid, in, first, live, panel, pitch);
      Walk walk(grid, first);
      for (int i = 0; i < live; ++i, walk.step()) {
        rows[i] = out.data + walk.place(out.height, out.width) * cols;
      }
      if (o > 0) {
        multiply_columns<true>(panel, pitch, operands[o].weight, cols, depth, rows, live);
      } else {
        multiply_columns<false>(panel, pitch, operands[o].weight, cols, depth, rows, live);
      }
    }
    then(rows, live);
  }
}

// Rows of the smallest tile of an outer product: a grey image's 3 x 3 taps, where they fit.
constexpr int kFewestRows = kTileRows < 9 ? kTileRows : 9;

// c [depth, cols] += A' B over `live` rows of both, in tiles of R rows; depth is at least R.
template <int R, class T>
void outer_in_tiles(const T* a, int64_t pitch, int depth, const T* b, int64_t b_pitch, int cols,
                    int live, T* c) {
  constexpr int L = lanes<T>;
  for (int k = 0; k < depth; k += R) {
    // The last tile begins earlier, and leaves alone what was done.
    const int from = k + R <= depth ? k : depth - R;
    T* const to = c + int64_t(from) * cols;
    int j = 0;
    for (; j + 2 * L <= cols; j += 2 * L) {
      outer_tile<R, 2>(a + from, pitch, b + j, b_pitch, live, to + j, int64_t(cols), k - from);
    }
    for (; j < cols; j += L) {
      outer_tile<R, 1>(a + from, pitch, b + j, b_pitch, live, to + j, int64_t(cols), k - from);
    }
  }
}

// Of a tile, so that few rows of a product are done twice.
inline int rows_of_tile(int depth) {
  constexpr int kChoices[] = {kTileRows, 13, 11, kFewestRows};
  int best = kFewestRows, least = 1 << 30;
  for (int rows : kChoices) {
    const int done = (depth + rows - 1) / rows * (rows + 1);  // and a tile costs by itself
    if (rows <= depth && rows <= kTileRows && done < least) best = rows, least = done;
  }
  return best;
}

// The same in the best tiles; depth is at least kFewestRows.
template <class T>
void outer(const T* a, int64_t pitch, int depth, const T* b, int64_t b_pitch, int cols, int live,
           T* c) {
  const int rows = rows_of_tile(depth);
  if (rows == kTileRows) {
    return outer_in_tiles<kTileRows>(a, pitch, depth, b, b_pitch, cols, live, c);
  }
  if constexpr (kTileRows > 13) {
    if (rows == 13) return outer_in_tiles<13>(a, pitch, depth, b, b_pitch, cols, live, c);
    if (rows == 11) return outer_in_tiles<11>(a, pitch, depth, b, b_pitch, cols, live, c);
  }
  outer_in_tiles<kFewestRows>(a, pitch, depth, b, b_pitch, cols, live, c);
}

// The same for a shallow one, whose rows go on with zeros: by way of a tile of its own.
template <class T>
void outer_shallow(const T* a, int64_t pitch, int depth, const T* b, int64_t b_pitch, int cols,
                   int live, T* c) {
  constexpr int L = lanes<T>;
  for (int j = 0; j < cols; j += L) {
    T tile[kFewestRows * L];
    conv::clear(tile, kFewestRows * L);
    outer_tile<kFewestRows, 1>(a, pitch, b + j, b_pitch, live, tile, int64_t(L), 0);
    for (int i = 0; i < depth; ++i) {
      T* const to = c + int64_t(i) * cols + j;
      store(to, load(to) + load(tile + i * L));
    }
  }
}

// weight [depth, cols] += a panel's part in its gradient.
template <class T>
void add_panel(T* panel, int64_t pitch, int depth, const T* derivative, int64_t derivative_pitch,
               int cols, int live, T* weight) {
  if (depth >= kFewestRows) {
    outer(panel, pitch, depth, derivative, derivative_pitch, cols, live, weight);
    return;
  }
  for (int i = 0; i < live; ++i) conv::clear(panel + i * pitch + depth, kFewestRows - depth);
  outer_shallow(panel, pitch, depth, derivative, derivative_pitch, cols, live, weight);
}

// weight [depth, cols] += the sum over pixels of what they read, times their derivatives.
template <class T>
void convolve_weight(const Grid& grid, int64_t examples, const Images<const T>& in,
                     const Images<const T>& derivative, T* weight, T* panel) {
  const int depth = int(grid.taps.size()) * in.channels, cols = derivative.channels;
  const int64_t pitch = depth + kGap, pixels = examples * grid.rows * grid.cols;
  int64_t most = kPanelBytes / int64_t(sizeof(T)) / pitch;
  if (most < kTileRows) most = kTileRows;
  for (int64_t first = 0; first < pixels; first += most) {
    const int live = int(pixels - first < most ? pixels - first : most);
    gather(grid, in, first, live, panel, pitch);
    add_panel(panel, pitch, depth, derivative.data + first * cols, cols, cols, live, weight);
  }
}

// The weight as the adjoint's grids take it, one after the other: [taps, out, in].
template <class T>
void turn_weight(const fastmeta::conv::Shape& shape, const T* weight, T* turned) {
  const int64_t size = int64_t(shape.in) * shape.out;
  const Grid* grids = shape.backward.data();
  for (int g = 0; g < int(shape.backward.size()); ++g) {
    const int* taps = grids[g].taps.data();
    for (int i = 0; i < int(grids[g].taps.size()); ++i, turned += size) {
      transpose(weight + taps[i] * size, shape.in, shape.out, turned);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
