// Products of matrices in shared memory, by tiles in registers.
#pragma once

#include "float4.h"
#include "machine.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// Each thread makes tiles of 2 x 2 elements of the result, a tile's rows and columns as far apart as
// there are tiles: neighbouring threads so read neighbouring elements. `use(sum, i, j)` gets every
// element of the sum of all products. For doubles, for columns, and for what else can't be read four
// elements at a time. `storage[place]` gives one.
template <class T, class Storage, int count, class Use>
FASTMETA_DEVICE void for_tiles(Storage storage, int rows, int cols, const Factors (&factors)[count],
                               Use use) {
  const int down = (rows + 1) / 2, across = (cols + 1) / 2;
  for (int tile = cuda::thread(); tile < down * across; tile += cuda::threads()) {
    const int first_row = tile / across, first_col = tile - first_row * across;
    T sums[2][2] = {};
#pragma unroll
    for (int part = 0; part < count; ++part) {
      const View a = factors[part].left, b = factors[part].right;
      int left[2], right[2];
      // Past the last row or column, that one again.
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = first_row + n * down, col = first_col + n * across;
        left[n] = int(a.offset) + (row < rows ? row : rows - 1) * a.row_stride;
        right[n] = int(b.offset) + (col < cols ? col : cols - 1) * b.col_stride;
      }
#pragma unroll 2
      for (int k = 0; k < a.cols; ++k) {
        T x[2], y[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          x[n] = storage[left[n] + k * a.col_stride], y[n] = storage[right[n] + k * b.row_stride];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int c = 0; c < 2; ++c) sums[r][c] += x[r] * y[c];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = first_row + r * down, j = first_col + c * across;
        if (i < rows && j < cols) use(sums[r][c], i, j);
      }
    }
  }
}

// The same by tiles of 16 x 8, which a warp makes on the tensor cores; operands are rounded to TF32.
//
// An instruction takes 8 of the depth, two of each of four lanes: which ones does not matter, if they
// are the same on both sides. Rows begin s = 4 times an odd count apart. Along a contiguous depth lane
// (g, t) takes those at t and t + 4, and so reads at g s + t; across it those at 2 t and 2 t + 1, at
// 2 t s + g: all in different banks. Where the sides differ the right one is read at t s + g, and two
// lanes meet in every bank.
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
      const bool is_deep = a.col_stride == 1;
      const int own = is_deep ? member : 2 * member, next = is_deep ? 4 : 1;
#pragma unroll 2
      for (int start = own; start - own < a.cols; start += 8) {
        float x[4], y[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = start + half * next;
          const bool is_there = k < a.cols;
          x[2 * half] = is_there ? storage[upper + k * a.col_stride] : 0;
          x[2 * half + 1] = is_there ? storage[lower + k * a.col_stride] : 0;
          y[half] = is_there ? storage[right + k * b.row_stride] : 0;
        }
        cuda::add_tile_product(sums, x, y);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int i = first_row + group + n / 2 * 8, j = first_col + member * 2 + n % 2;
      if (i < rows && j < cols) use(sums[n], i, j);
    }
  }
}

// `one(sum, i, j)` gets every element of the sum of all products, or `four(sums, i, j)` four of a row.
template <class T, class Storage, int count, class One, class Quad>
FASTMETA_DEVICE void product(Storage storage, int rows, int cols, const Factors (&factors)[count],
                             [[maybe_unused]] bool tf32, One one, [[maybe_unused]] Quad four) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tf32) return for_warp_tiles(storage, rows, cols, factors, one);
    if (multiply_by_float4(storage, rows, cols, factors, one, four)) return;
  }
  for_tiles<T>(storage, rows, cols, factors, one);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
