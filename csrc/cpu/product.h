// Matrix products of small matrices whose entries are vectors, held in registers tile by tile.
#pragma once

#include <cstdint>

#include "../network.h"
#include "math.h"
#include "spend.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// A matrix where it lies.
template <class Num>
struct Matrix {
  Num* data;
  int64_t row_stride, col_stride;
  Num& operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix from(int64_t i, int64_t j) const { return {&(*this)(i, j), row_stride, col_stride}; }
};

// sum += A B on an M x N tile; `depth` is the length of the sums. B's entries are vectors, or
// scalars for all lanes.
template <int M, int N, class Num, class Entry>
__attribute__((always_inline)) inline void accumulate(Num (&sum)[M][N], Matrix<Num> a,
                                                      Matrix<Entry> b, int depth) {
  for (int k = 0; k < depth; ++k) {
    Num right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = b(k, j) - Num{};
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Num left = a(i, k);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
}

// One or two products into one tile.
template <class Num>
struct Terms {
  Matrix<Num> a[2], b[2];
  const Lane<Num>* shared[2];  // in place of b's vectors, where all lanes have the same there
  int depth[2];
  int count;
  Terms from(int64_t i, int64_t j) const {
    Terms moved = *this;
    for (int t = 0; t < count; ++t) {
      moved.a[t] = a[t].from(i, 0);
      moved.b[t] = b[t].from(0, j);
      if (shared[t]) moved.shared[t] += j * b[t].col_stride;
    }
    return moved;
  }
};

template <int M, int N, class Num>
__attribute__((always_inline)) inline void accumulate(Num (&sum)[M][N], const Terms<Num>& terms) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = Num{};
  }
  for (int t = 0; t < terms.count; ++t) {
    const Matrix<Num>& b = terms.b[t];
    if (terms.shared[t]) {
      const Matrix<const Lane<Num>> values{terms.shared[t], b.row_stride, b.col_stride};
      accumulate(sum, terms.a[t], values, terms.depth[t]);
    } else {
      accumulate(sum, terms.a[t], b, terms.depth[t]);
    }
  }
}

// A tile at the edge: its sums go to memory, so that one function serves every epilogue.
template <int M, int N, class Num>
__attribute__((noinline)) void edge(Num* sums, const Terms<Num>& terms) {
  Num sum[M][N];
  accumulate(sum, terms);
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) sums[i * N + j] = sum[i][j];
  }
}

template <int M, int Columns, class Num>
void edge_columns(Num* sums, const Terms<Num>& terms, int n) {
  if constexpr (Columns > 0) {
    if (n == Columns) return edge<M, Columns>(sums, terms);
    edge_columns<M, Columns - 1>(sums, terms, n);
  }
}

template <int Rows, int Columns, class Num>
void edge_rows(Num* sums, const Terms<Num>& terms, int m, int n) {
  if constexpr (Rows > 0) {
    if (m == Rows) return edge_columns<Rows, Columns>(sums, terms, n);
    edge_rows<Rows - 1, Columns>(sums, terms, m, n);
  }
}

// `use(i, j, sum)` for every entry of an m x n tile, at most Rows x Columns.
template <int Rows, int Columns, class Num, class Use>
__attribute__((always_inline)) inline void tile(const Terms<Num>& terms, int m, int n, Use use) {
  if (m == Rows && n == Columns) {
    Num sum[Rows][Columns];
    accumulate(sum, terms);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) use(r, c, sum[r][c]);
    }
  } else {
    Num sums[Rows * Columns];
    edge_rows<Rows, Columns>(sums, terms, m, n);
    for (int r = 0; r < m; ++r) {
      for (int c = 0; c < n; ++c) use(r, c, sums[r * n + c]);
    }
  }
}

// How much of B stays in the first cache while all rows of A go by.
constexpr int64_t kBytesOfB = 16 << 10;

// That in columns, whole tiles of them.
template <int Columns, class Num>
int columns_together(const Terms<Num>& terms) {
  int64_t depth = 1;
  for (int t = 0; t < terms.count; ++t) depth += terms.depth[t];
  const int tiles = int(kBytesOfB / (depth * Columns * int64_t(sizeof(Num))));
  return Columns * (tiles > 1 ? tiles : 1);
}

// `use(i, j, sum)` for every entry of a rows x cols product, which `budget` pays for.
template <int Rows, int Columns, class Num, class Use>
void product(const Terms<Num>& terms, int rows, int cols, cpu::Budget& budget, Use use) {
  const int64_t depth = terms.depth[0] + (terms.count > 1 ? terms.depth[1] : 0);
  const int together = columns_together<Columns>(terms);
  for (int left = 0; left < cols; left += together) {
    const int right = cols - left < together ? cols : left + together;
    for (int i = 0; i < rows; i += Rows) {
      for (int j = left; j < right; j += Columns) {
        const int m = rows - i < Rows ? rows - i : Rows;
        const int n = cols - j < Columns ? cols - j : Columns;
        tile<Rows, Columns>(terms.from(i, j), m, n,
                            [&](int r, int c, Num sum) { use(i + r, j + c, sum); });
      }
    }
    spend(budget, rows * depth * (right - left));
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
