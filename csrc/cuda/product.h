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

// The same by tiles of 16 x 8, which a warp makes on the tensor cores; operands are rounded to TF32.
// `storage[place]` gives a number.
//
// An instruction takes 8 of the depth, two of each of four lanes: which ones does not matter, if they
// are the same on both sides. Lane t takes those from 8 t on of a whole 32. The lanes (g, t) so read at
// g * stride + 8 t or at g + 8 t * stride: in different banks, where the stride is odd. Of a rest of up to
// 16, or of 8, they take 4 or 2 each, and two or four meet in a bank: no longer than a whole 32 takes.
template <class Storage, int count, class Use>
FASTMETA_DEVICE void for_warp_tiles(Storage storage, int rows, int cols,
                                    const Factors (&factors)[count], Use use) {
  const int group = cuda::thread() % 32 / 4, member = cuda::thread() % 4;
  const int across = (cols + 7) / 8, tiles = (rows + 15) / 16 * across;
  for (int tile = cuda::thread() / 32; tile < tiles; tile += cuda::threads() / 32) {
    const int first_row = tile / across * 16, first_col = tile % across * 8;
    float sums[4] = {};
#pragma unroll
    for (int part = 0; part < count; ++part) {
      const View a = factors[part].left, b = factors[part].right;
      // Past the last row or column, that one again.
      const auto left = [&](int row) {
        return int(a.offset) + (row < rows ? row : rows - 1) * a.row_stride;
      };
      const int col = first_col + group;
      const int upper = left(first_row + group), lower = left(first_row + group + 8);
      const int right = int(b.offset) + (col < cols ? col : cols - 1) * b.col_stride;
      for (int start = 0; start < a.cols; start += 32) {
        const int rest = a.cols - start, each = rest > 16 ? 8 : rest > 8 ? 4 : 2;
#pragma unroll 2
        for (int step = 0; step < each; step += 2) {
          float x[4], y[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int k = start + member * each + step + half;
            const bool is_there = k < a.cols;
            x[2 * half] = is_there ? storage[upper + k * a.col_stride] : 0;
            x[2 * half + 1] = is_there ? storage[lower + k * a.col_stride] : 0;
            y[half] = is_there ? storage[right + k * b.row_stride] : 0;
          }
          cuda::add_tile_product(sums, x, y);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int i = first_row + group + n / 2 * 8, j = first_col + member * 2 + n % 2;
      if (i < rows && j < cols) use(sums[n], i, j);
    }
  }
}

// Large tiles read less, small ones keep more threads at work. Doubles, which tests take, have no
// large ones: a second copy of every product, for which there are too few registers.
template <class T, int count, class Use>
FASTMETA_DEVICE void product(const T* storage, int rows, int cols, const Factors (&factors)[count],
                             [[maybe_unused]] bool tf32, Use use) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tf32) return for_warp_tiles(storage, rows, cols, factors, use);
    if (((rows + 3) / 4) * ((cols + 3) / 4) * 2 > cuda::threads()) {
      return for_tiles<T, 4, 4>(storage, rows, cols, factors, use);
    }
  }
  for_tiles<T, 2, 2>(storage, rows, cols, factors, use);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
