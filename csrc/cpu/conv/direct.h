// Direct convolution: rows of what pixels read, times the weight.
#pragma once

#include "gather.h"
#include "product.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// A row of a panel is so much longer than its numbers: not a multiple of 4 KiB, and long enough for
// the last tile.
constexpr int kGap = 16;
constexpr int kPanelBytes = 128 << 10;

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
      Walk walk(grid, first);
      for (int i = 0; i < live; ++i, walk.step()) {
        rows[i] = out.data + walk.place(out.height, out.width) * cols;
        walk.read(in, panel + i * pitch);
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

// weight [depth, cols] += the sum over pixels of what they read, times their derivatives.
template <class T>
void convolve_weight(const Grid& grid, int64_t examples, Images<const T> in,
                     Images<const T> derivative, T* weight, T* panel) {
  constexpr int R = kTileRows, L = lanes<T>;
  const int depth = int(grid.taps.size()) * in.channels, cols = derivative.channels;
  const int64_t pitch = depth + kGap, pixels = examples * grid.rows * grid.cols;
  int64_t most = kPanelBytes / int64_t(sizeof(T)) / pitch;
  if (most < R) most = R;
  for (int64_t first = 0; first < pixels; first += most) {
    const int live = int(pixels - first < most ? pixels - first : most);
    Walk walk(grid, first);
    for (int i = 0; i < live; ++i, walk.step()) {
      walk.read(in, panel + i * pitch);
      if (depth < R) conv::clear(panel + i * pitch + depth, R - depth);
    }
    const T* rows = derivative.data + first * cols;
    for (int k = 0; k < depth; k += R) {
      // The last tile begins earlier, and leaves alone what was done; a short one reads zeros, and
      // writes into a tile of its own.
      const int from = k + R <= depth || depth < R ? k : depth - R;
      T few[R * 2 * L];
      for (int j = 0; j < cols;) {
        const bool two = j + 2 * L <= cols;
        T* to = weight + int64_t(from) * cols + j;
        if (depth < R) conv::clear(few, R * 2 * L);
        T* const at = depth < R ? few : to;
        const int64_t apart = depth < R ? 2 * L : cols;
        if (two) {
          outer_tile<2>(panel + from, pitch, rows + j, int64_t(cols), live, at, apart, k - from);
        } else {
          outer_tile<1>(panel + from, pitch, rows + j, int64_t(cols), live, at, apart, k - from);
        }
        for (int i = 0; depth < R && i < depth; ++i) {
          for (int v = 0; v < (two ? 2 : 1); ++v) {
            T* number = to + int64_t(i) * cols + v * L;
            store(number, load(number) + load(few + i * 2 * L + v * L));
          }
        }
        j += two ? 2 * L : L;
      }
    }
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

// derivative by the input = the adjoint over all grids; operands hold derivatives by the output and
// turned weights.
template <class T>
void convolve_back(const fastmeta::conv::Shape& shape, int64_t examples, const Operand<T>* operands,
                   int count, Images<T> out, T* panel) {
  const Grid* grids = shape.backward.data();
  Operand<T> at[2] = {operands[0], operands[count - 1]};
  for (int g = 0; g < int(shape.backward.size()); ++g) {
    const Images<const T> in{nullptr, shape.rows, shape.cols, shape.out};
    convolve(grids[g], examples, in, at, count, out, panel, [](T* const*, int) {});
    for (Operand<T>& operand : at) {
      operand.weight += int64_t(grids[g].taps.size()) * shape.in * shape.out;
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
