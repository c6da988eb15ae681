// Matrix products with lanes over the columns: strips of vectors, each number of A broadcast.
#pragma once

#include <cstdint>

#include "transpose.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// A B, `depth` numbers deep. The columns of B lie side by side.
template <class T>
struct Factors {
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth;
  int depth;
};

// One or two products into one tile.
template <class T>
struct Sum {
  Factors<T> of[2];
  int count;
  // Without A's strides known, the compiler keeps a pointer for every row.
  bool along_depth() const { return of[0].a_depth == 1 && (count == 1 || of[1].a_depth == 1); }
  Sum from(int64_t i, int64_t j) const {
    Sum moved = *this;
    for (int t = 0; t < count; ++t) {
      moved.of[t].a += i * of[t].a_row;
      moved.of[t].b += j;
    }
    return moved;
  }
};

#if FASTMETA_BYTES == 64 || defined(__aarch64__)
constexpr int kMostVectors = 4, kAccumulators = 24, kMostRows = 14;
#else
constexpr int kMostVectors = 3, kAccumulators = 12, kMostRows = 10;
#endif
constexpr int rows_of_tile(int vectors) {
  return kAccumulators / vectors < kMostRows ? kAccumulators / vectors : kMostRows;
}

template <int R, int C, class Num>
__attribute__((always_inline)) inline void accumulate_strip(Num (&sum)[R][C],
                                                            const Factors<Lane<Num>>& f) {
  using T = Lane<Num>;
  const T* b = f.b;
  const T* a = f.a;
  for (int k = 0; k < f.depth; ++k, a += f.a_depth, b += f.b_depth) {
    const Num* right = reinterpret_cast<const Num*>(b);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += a[r * f.a_row] * right[c];
    }
  }
}

// The sums of R rows and C vectors go to memory, so that one function serves every use of them.
template <int R, int C, class Num>
__attribute__((noinline)) void tile(const Sum<Lane<Num>>& terms, Num* out) {
  Num sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = Num{};
  }
  for (int t = 0; t < terms.count; ++t) accumulate_strip<R, C, Num>(sum, terms.of[t]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) out[r * C + c] = sum[r][c];
  }
}

template <class Num>
using Tile = void (*)(const Sum<Lane<Num>>&, Num*);

template <int C, int R, class Num>
Tile<Num> tile_of_rows(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of_rows<C, R - 1, Num>(rows);
  }
  return &tile<R, C, Num>;
}

// `use(i, rows, j, sums)` for every tile; j counts vectors, as does `vectors`.
template <int C, class Num, class Use>
void strip(const Sum<Lane<Num>>& terms, int rows, int j, Use use) {
  constexpr int most = rows_of_tile(C), width = width_of<Num>;
  const int pieces = (rows + most - 1) / most, less = rows / pieces, longer = rows % pieces;
  const Tile<Num> full = tile_of_rows<C, most, Num>(less + (longer > 0));
  const Tile<Num> rest = tile_of_rows<C, most, Num>(less);
  Num sums[most * C];
  for (int piece = 0, i = 0; piece < pieces; ++piece) {
    const int here = less + (piece < longer);
    (piece < longer ? full : rest)(terms.from(i, int64_t(j) * width), sums);
    use(i, here, j, sums);
    i += here;
  }
}

// Calls use.template operator()<C>... for every strip of a rows x vectors product.
template <class Num, class Use>
void strips(const Sum<Lane<Num>>& terms, int rows, int vectors, Use use) {
  const int pieces = (vectors + kMostVectors - 1) / kMostVectors;
  for (int piece = 0, j = 0; piece < pieces; ++piece) {
    const int here = vectors / pieces + (piece < vectors % pieces);
    const auto with = [&](int i, int count, int j, const Num* sums) {
      use(i, count, j, here, sums);
    };
    if (here == 1) strip<1, Num>(terms, rows, j, with);
    if (here == 2) strip<2, Num>(terms, rows, j, with);
    if (here == 3) strip<3, Num>(terms, rows, j, with);
    if constexpr (kMostVectors > 3) {
      if (here == 4) strip<4, Num>(terms, rows, j, with);
    }
    j += here;
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
