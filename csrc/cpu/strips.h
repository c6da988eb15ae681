// Matrix products with lanes over the columns: strips of vectors, each number of A broadcast.
#pragma once

#include <cstdint>

#include "spend.h"
#include "transpose.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// A B; `depth` is the length of its sums. The columns of B lie side by side. `far`: A may not be in the caches.
template <class T>
struct Factors {
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth;
  int depth;
  bool far;
};

// One or two products into one tile. The rows of the result begin at `out`.
template <class T>
struct Sum {
  Factors<T> of[2];
  int count;
  const T* out;
  int64_t out_row;
  Sum from(int64_t i, int64_t j) const {
    Sum moved = *this;
    for (int t = 0; t < count; ++t) {
      moved.of[t].a += i * of[t].a_row;
      moved.of[t].b += j;
    }
    return moved;
  }
  int depth() const { return of[0].depth + (count > 1 ? of[1].depth : 0); }
  // One of the products alone, from depth k to `end`.
  Sum slice(int t, int k, int end) const {
    Factors<T> f = of[t];
    f.a += k * f.a_depth;
    f.b += k * f.b_depth;
    f.depth = end - k;
    return {{f}, 1, out, out_row};
  }
};

#if FASTMETA_BYTES == 64
constexpr int kMostVectors = 4, kAccumulators = 24, kMostRows = 14;
#elif defined(__aarch64__)  // with more sums compilers leave no registers for A's elements
constexpr int kMostVectors = 4, kAccumulators = 20, kMostRows = 14;
#else
constexpr int kMostVectors = 3, kAccumulators = 12, kMostRows = 10;
#endif
// How deep a strip of B may be, so that it stays in the second cache, and the rows whose sums wait
// where it is deeper.
constexpr int kDeepest = 1024, kWaitingRows = 56;
// Of results larger than that, the tile's own is fetched into the first cache while it is computed.
constexpr int kLargestNear = 32 << 10;
// Of A's larger than that the next rows are fetched into the second cache.
constexpr int kLargestA = 128 << 10;
constexpr int rows_of_tile(int vectors) {
  return kAccumulators / vectors < kMostRows ? kAccumulators / vectors : kMostRows;
}

template <bool Far, int R, int C, class Num>
__attribute__((always_inline)) inline void accumulate_strip(Num (&sum)[R][C],
                                                            const Factors<Lane<Num>>& f) {
  using T = Lane<Num>;
  const T* b = f.b;
  const T* a = f.a;
  // At each step one number of what the next rows take in memory, if they lie one behind the other,
  // or of what lies beside this step's.
  const T* next = a + R * f.a_row;
  const int64_t step = f.a_depth == 1 ? R : f.a_depth;
  for (int k = 0; k < f.depth; ++k, a += f.a_depth, b += f.b_depth, next += step) {
    if constexpr (Far) __builtin_prefetch(next, 0, 2);
    const Num* right = reinterpret_cast<const Num*>(b);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += a[r * f.a_row] * right[c];
    }
  }
}

// Sums of R rows and C vectors, from those in `out` on where they are `begun`. They go to memory,
// so that one function serves every use of them.
template <int R, int C, class Num>
__attribute__((noinline)) void tile(const Sum<Lane<Num>>& terms, Num* out, bool begun) {
  Num sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = begun ? out[r * C + c] : Num{};
  }
  for (int t = 0; t < terms.count; ++t) {
    // Tiles of one vector are bound by their loads as they are.
    if (C > 1 && terms.of[t].far) {
      accumulate_strip<(C > 1), R, C, Num>(sum, terms.of[t]);
    } else {
      accumulate_strip<false, R, C, Num>(sum, terms.of[t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) out[r * C + c] = sum[r][c];
  }
}

template <class Num>
using Tile = void (*)(const Sum<Lane<Num>>&, Num*, bool);

template <int C, int R, class Num>
Tile<Num> tile_of_rows(int rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of_rows<C, R - 1, Num>(rows);
  }
  return &tile<R, C, Num>;
}

// Rows cut into tiles whose heights differ by at most one.
template <int C, class Num>
struct Tiles {
  int short_rows, longer;
  Tile<Num> of_short, of_long;
  explicit Tiles(int rows) {
    constexpr int most = rows_of_tile(C);
    const int pieces = (rows + most - 1) / most;
    short_rows = rows / pieces, longer = rows % pieces;
    of_short = tile_of_rows<C, most, Num>(short_rows);
    of_long = longer > 0 ? tile_of_rows<C, most, Num>(short_rows + 1) : of_short;
  }
  int rows(int piece) const { return short_rows + (piece < longer); }
  Tile<Num> of(int piece) const { return piece < longer ? of_long : of_short; }
};

// `use(i, rows, sums)` for a few rows at a time of C vectors from column j on.
template <int C, class Num, class Use>
void strip(const Sum<Lane<Num>>& terms, int rows, int64_t j, Use use) {
  const bool deep = terms.depth() > kDeepest;
  const bool far = int64_t(rows) * terms.out_row * int(sizeof(Lane<Num>)) > kLargestNear;
  const Tiles<C, Num> tiles(rows);
  Num sums[kWaitingRows * C];
  for (int piece = 0, i = 0; i < rows;) {
    // Where B's strip is deep, many rows share a slice of it before the next.
    int here = tiles.rows(piece), pieces = 1;
    while (deep && i + here < rows && here + tiles.rows(piece + pieces) <= kWaitingRows) {
      here += tiles.rows(piece + pieces++);
    }
    for (int r = 0; far && r < here; ++r) {
      const Lane<Num>* row = terms.out + (i + r) * terms.out_row + j;
      for (int c = 0; c < C; ++c) __builtin_prefetch(row + c * width_of<Num>, 1);
    }
    if (!deep) {
      tiles.of(piece)(terms.from(i, j), sums, false);
    } else {
      bool begun = false;
      for (int t = 0; t < terms.count; ++t) {
        const int depth = terms.of[t].depth, slices = (depth + kDeepest - 1) / kDeepest;
        for (int s = 0; s < slices; ++s, begun = true) {
          const Sum<Lane<Num>> slice =
              terms.slice(t, int64_t(depth) * s / slices, int64_t(depth) * (s + 1) / slices);
          for (int p = 0, row = 0; p < pieces; row += tiles.rows(piece + p++)) {
            tiles.of(piece + p)(slice.from(i + row, j), sums + row * C, begun);
          }
        }
      }
    }
    use(i, here, sums);
    i += here, piece += pieces;
  }
}

// use(i, rows, j, vectors, sums) for all of a product, which `budget` pays for, a strip of columns at
// a time; j and `vectors` count vectors.
template <class Num, class Use>
void strips(const Sum<Lane<Num>>& terms, int rows, int vectors, cpu::Budget& budget, Use use) {
  const int pieces = (vectors + kMostVectors - 1) / kMostVectors;
  for (int piece = 0, j = 0; piece < pieces; ++piece) {
    const int here = vectors / pieces + (piece < vectors % pieces);
    const int64_t column = int64_t(j) * width_of<Num>;
    const auto with = [&](int i, int count, const Num* sums) { use(i, count, j, here, sums); };
    if (here == 1) strip<1, Num>(terms, rows, column, with);
    if (here == 2) strip<2, Num>(terms, rows, column, with);
    if (here == 3) strip<3, Num>(terms, rows, column, with);
    if constexpr (kMostVectors > 3) {
      if (here == 4) strip<4, Num>(terms, rows, column, with);
    }
    j += here;
    spend(budget, int64_t(rows) * terms.depth() * here);
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
