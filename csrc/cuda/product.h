// Products of matrices in shared memory, by tiles in registers.
#pragma once

#include "../network.h"
#include "machine.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// Two matrices of which a product is, or a part of it.
struct Factors {
  View left, right;
};

// Each thread makes tiles of R x C numbers of the result, a tile's rows and columns as far apart as
// there are tiles: neighbouring threads so read neighbouring numbers, and since rows begin an odd
// count apart, neither rows nor columns meet in a bank of shared memory. `use(sum, i, j)` gets
// every number of the sum of all products.
template <class T, int R, int C, int count, class Use>
FASTMETA_DEVICE void for_tiles(const T* storage, int rows, int cols, const Factors (&factors)[count],
                               Use use) {
  const int down = (rows + R - 1) / R, across = (cols + C - 1) / C;
  for (int tile = cuda::thread(); tile < down * across; tile += cuda::threads()) {
    const int first_row = tile / across, first_col = tile - first_row * across;
    T sums[R][C] = {};
#pragma unroll
    for (int part = 0; part < count; ++part) {
      const View a = factors[part].left, b = factors[part].right;
      int left[R], right[C];
      // Past the last row or column, that one again.
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int row = first_row + r * down;
        left[r] = int(a.offset) + (row < rows ? row : rows - 1) * a.row_stride;
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int col = first_col + c * across;
        right[c] = int(b.offset) + (col < cols ? col : cols - 1) * b.col_stride;
      }
#pragma unroll 2
      for (int k = 0; k < a.cols; ++k) {
        T x[R], y[C];
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] = storage[left[r] + k * a.col_stride];
#pragma unroll
        for (int c = 0; c < C; ++c) y[c] = storage[right[c] + k * b.row_stride];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int c = 0; c < C; ++c) sums[r][c] += x[r] * y[c];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int i = first_row + r * down, j = first_col + c * across;
        if (i < rows && j < cols) use(sums[r][c], i, j);
      }
    }
  }
}

// Large tiles read less, small ones keep more threads at work. Doubles, which tests take, have no
// large ones: a second copy of every product, for which there are too few registers.
template <class T, int count, class Use>
FASTMETA_DEVICE void product(const T* storage, int rows, int cols, const Factors (&factors)[count],
                             Use use) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (((rows + 3) / 4) * ((cols + 3) / 4) * 2 > cuda::threads()) {
      return for_tiles<T, 4, 4>(storage, rows, cols, factors, use);
    }
  }
  for_tiles<T, 2, 2>(storage, rows, cols, factors, use);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
