// Matrix products with lanes over the depth: for long rows, and few columns that would not fill
// vectors.
#pragma once

#include <cstdint>

#include "lane_sums.h"
#include "spend.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// A B', where rows are contiguous in both: A is [rows, depth], B [cols, depth],
// with at least a vector of elements in a row.
template <class T>
struct Dots {
  const T* a;
  int64_t a_row;
  const T* b;
  int64_t b_row;
  int rows, cols, depth;
};

#if FASTMETA_BYTES == 64 || defined(__aarch64__)
constexpr int kDotRows = 5, kDotColumns = 5;
#else
constexpr int kDotRows = 3, kDotColumns = 3;
#endif

// Vectors whose lanes' sums are the rows i ... and C columns j ... of the product; a row's begin
// `width` vectors after the one before. Where there are no more rows, the last is repeated.
template <int C, class Num>
__attribute__((noinline)) void dot_tile(const Dots<Lane<Num>>& product, int i, int j, Num* out) {
  using T = Lane<Num>;
  constexpr int width = width_of<Num>;
  const T* left[kDotRows];
#pragma GCC unroll 8
  for (int r = 0; r < kDotRows; ++r) {
    const int row = i + r < product.rows ? i + r : product.rows - 1;
    left[r] = product.a + row * product.a_row;
  }
  const T* right = product.b + j * product.b_row;
  Num sum[kDotRows][C] = {};
  const auto add = [&](int k, auto keep) {
    Num columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      columns[c] = keep(load_part<Num>(right + c * product.b_row + k, width));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) {
      const Num row = keep(load_part<Num>(left[r] + k, width));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] += row * columns[c];
    }
  };
  const int rest = product.depth % width, whole = product.depth - rest;
  for (int k = 0; k < whole; k += width) add(k, [](Num part) { return part; });
  // The last vector ends where the row does; what is in the sums already is left out.
  const auto late = iota<Num>() >= width - rest;
  if (rest > 0) {
    add(product.depth - width, [late](Num part) { return select(late, part, Num{}); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kDotRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) out[r * width + c] = sum[r][c];
  }
}

template <int C, class Num>
void dot_columns(const Dots<Lane<Num>>& product, int i, int j, int columns, Num* out) {
  if constexpr (C > 1) {
    if (columns < C) return dot_columns<C - 1, Num>(product, i, j, columns, out);
  }
  dot_tile<C, Num>(product, i, j, out);
}

// The sums of the rows i ... and the columns j ... that one vector holds.
template <class Num>
__attribute__((noinline)) void dot_block(const Dots<Lane<Num>>& product, int i, int j, Num* sums) {
  constexpr int width = width_of<Num>;
  const int cols = product.cols - j < width ? product.cols - j : width;
  const int pieces = (cols + kDotColumns - 1) / kDotColumns;
  Num parts[kDotRows * width] = {};
  for (int piece = 0, at = 0; piece < pieces; ++piece) {
    const int here = cols / pieces + (piece < cols % pieces);
    dot_columns<kDotColumns, Num>(product, i, j + at, here, parts + at);
    at += here;
  }
  for (int r = 0; r < kDotRows; ++r) sums[r] = lane_sums(parts + r * width);
}

// use(i, rows, j, 1, sums) for all of a product, as `strips` calls it; j counts vectors.
template <class Num, class Use>
void dots(const Dots<Lane<Num>>& product, cpu::Budget& budget, Use use) {
  constexpr int width = width_of<Num>;
  for (int i = 0; i < product.rows; i += kDotRows) {
    const int rows = product.rows - i < kDotRows ? product.rows - i : kDotRows;
    for (int j = 0; j < product.cols; j += width) {
      Num sums[kDotRows];
      dot_block(product, i, j, sums);
      use(i, rows, j / width, 1, sums);
    }
    spend(budget, int64_t(rows) * product.cols * (product.depth / width));
  }
}

// Whether that takes fewer multiply-adds of vectors, the lanes' sums counted as what they cost. A
// product by strips fills its columns up to whole vectors.
template <class Num>
bool dots_pay(int cols, int depth) {
  constexpr int width = width_of<Num>;
  const int64_t vectors = (cols + width - 1) / width, deep = (depth + width - 1) / width;
  return cols * deep + 6 * width * vectors < depth * vectors;
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
