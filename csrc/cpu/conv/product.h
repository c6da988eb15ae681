// Products of small matrices held in registers, on which every convolution here rests.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

constexpr int kTileRows = FASTMETA_CONV_ROWS;

// Of a sum of products A B: the first row of A, B [depth, cols].
template <class T>
struct Term {
  const T *a, *b;
  int depth;
};

// The terms of a product C [rows, cols]. Rows of each A lie `pitch` apart, beginning `shift` behind
// what the term says; those of C `c_pitch` apart.
template <class T>
struct Product {
  const Term<T>* terms;
  int count;
  int64_t shift, pitch;
  int cols;
  T* c;
  int64_t c_pitch;
  bool add;  // to what is in C
};

// V vectors of columns from `col` on, R rows, of which the first `live` are written.
template <int R, int V, class T>
void multiply_tile(const Product<T>& p, int col, int live) {
  constexpr int L = lanes<T>;
  Num<T> sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = Num<T>{};
  }
  const int64_t pitch = p.pitch, cols = p.cols;
  for (const Term<T>* term = p.terms; term < p.terms + p.count; ++term) {
    const T *a = term->a + p.shift, *b = term->b + col;
    for (const T* const end = a + term->depth; a < end; ++a) {
      Num<T> row[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) row[j] = load(b + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Num<T> x = all(a[i * pitch]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] += x * row[j];
      }
      b += cols;
    }
  }
  T* c = p.c + col;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    if (i >= live) break;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      store(c + j * L, p.add ? load(c + j * L) + sums[i][j] : sums[i][j]);
    }
    c += p.c_pitch;
  }
}

// All columns of R rows.
template <int R, class T>
void multiply_rows(const Product<T>& p, int live) {
  constexpr int L = lanes<T>, V = 4 * R <= 2 * kTileRows ? 4 : 2;
  int col = 0;
  for (; col + V * L <= p.cols; col += V * L) multiply_tile<R, V>(p, col, live);
  for (; col < p.cols; col += L) multiply_tile<R, 1>(p, col, live);
}

// At most kTileRows rows, in the smallest tile that has them.
template <class T>
void multiply(const Product<T>& p, int live) {
  if constexpr (kTileRows >= 10) {
    if (live <= 5) return multiply_rows<5>(p, live);
    if (live <= 8) return multiply_rows<8>(p, live);
    if (live <= 10) return multiply_rows<10>(p, live);
  }
  multiply_rows<kTileRows>(p, live);
}

// Rows of A and of B, two by two: three loops around them, the outermost first, and how far apart
// they lie in each.
struct Pairs {
  int64_t count[3], a[3], b[3];
};

// Pairs that are summed before they go to C: one long sum's rounding grows with its length.
constexpr int64_t kPairsTogether = 64;

// C [R, V vectors] += A' B over pairs of rows; C's rows `cols` apart, those before `skip` left
// alone.
template <int R, int V, class T>
void outer_tile(const Pairs& pairs, const T* a, const T* b, T* c, int64_t cols, int skip) {
  constexpr int L = lanes<T>;
  const int64_t lines = pairs.count[0] * pairs.count[1], length = pairs.count[2];
  const int64_t together = std::max<int64_t>(1, kPairsTogether / length);
  int64_t n = 0, m = 0;
  for (int64_t line = 0; line < lines;) {
    Num<T> sums[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = Num<T>{};
    }
    for (const int64_t end = line + together < lines ? line + together : lines; line < end; ++line) {
      const T* left = a + n * pairs.a[0] + m * pairs.a[1];
      const T* right = b + n * pairs.b[0] + m * pairs.b[1];
      for (int64_t p = 0; p < length; ++p) {
        Num<T> row[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) row[j] = load(right + j * L);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Num<T> x = all(left[i]);
#pragma GCC unroll 4
          for (int j = 0; j < V; ++j) sums[i][j] += x * row[j];
        }
        left += pairs.a[2];
        right += pairs.b[2];
      }
      if (++m == pairs.count[1]) m = 0, ++n;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      if (i < skip) continue;
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        T* at = c + i * cols + j * L;
        store(at, load(at) + sums[i][j]);
      }
    }
  }
}

// Rows of the smallest tile of an outer product: a grey image's 3 x 3 taps, where they fit.
constexpr int kFewestRows = kTileRows < 9 ? kTileRows : 9;

// c [depth, cols] += A' B in tiles of R rows and V vectors; depth is at least R.
template <int R, int V = 2, class T>
void outer_in_tiles(const Pairs& pairs, const T* a, int depth, const T* b, int cols, T* c) {
  constexpr int L = lanes<T>;
  for (int k = 0; k < depth; k += R) {
    // The last tile begins earlier, and leaves alone what was done.
    const int from = k + R <= depth ? k : depth - R;
    T* const to = c + int64_t(from) * cols;
    int j = 0;
    for (; j + V * L <= cols; j += V * L) {
      outer_tile<R, V>(pairs, a + from, b + j, to + j, cols, k - from);
    }
    for (; j < cols; j += L) outer_tile<R, 1>(pairs, a + from, b + j, to + j, cols, k - from);
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

// The same for a shallow one, whose rows of A go on behind it: by way of a tile of its own.
template <class T>
void outer_shallow(const Pairs& pairs, const T* a, int depth, const T* b, int cols, T* c) {
  constexpr int L = lanes<T>;
  for (int j = 0; j < cols; j += L) {
    T tile[kFewestRows * L] = {};
    outer_tile<kFewestRows, 1>(pairs, a, b + j, tile, L, 0);
    for (int i = 0; i < depth; ++i) {
      T* const to = c + int64_t(i) * cols + j;
      store(to, load(to) + load(tile + i * L));
    }
  }
}

// The same in the best tiles.
template <class T>
void outer(const Pairs& pairs, const T* a, int depth, const T* b, int cols, T* c) {
  if (depth < 3) return outer_shallow(pairs, a, depth, b, cols, c);
  // Three taps of a grey image, and others that fill no larger tile.
  constexpr int kVectors = kTileRows > 6 ? 4 : 3;
  if (depth < kFewestRows) return outer_in_tiles<3, kVectors>(pairs, a, depth, b, cols, c);
  const int rows = rows_of_tile(depth);
  if (rows == kTileRows) return outer_in_tiles<kTileRows>(pairs, a, depth, b, cols, c);
  if constexpr (kTileRows > 13) {
    if (rows == 13) return outer_in_tiles<13>(pairs, a, depth, b, cols, c);
    if (rows == 11) return outer_in_tiles<11>(pairs, a, depth, b, cols, c);
  }
  outer_in_tiles<kFewestRows>(pairs, a, depth, b, cols, c);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
