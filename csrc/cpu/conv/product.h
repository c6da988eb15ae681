// Products of small matrices held in registers, on which every convolution here rests.
#pragma once

#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

constexpr int kTileRows = FASTMETA_CONV_ROWS;

// C [R, V vectors] = or += A B of `depth`, A row by row at `pitch`, B's rows `cols` apart. The first
// `live` rows of C are written, row i to c[i].
template <bool Add, int V, class T>
void multiply_tile(const T* a, int64_t pitch, const T* b, int64_t cols, int depth, T* const* c,
                   int live) {
  constexpr int R = kTileRows, L = lanes<T>;
  Num<T> sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = Num<T>{};
  }
  for (int k = 0; k < depth; ++k) {
    Num<T> row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) row[j] = load(b + j * L);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Num<T> x = all(a[i * pitch + k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] += x * row[j];
    }
    b += cols;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    if (i >= live) break;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      store(c[i] + j * L, Add ? load(c[i] + j * L) + sums[i][j] : sums[i][j]);
    }
  }
}

// C [R, V vectors] += A' B over `count` rows of both; C's rows `cols` apart, those before `skip`
// left alone.
template <int R, int V, class T>
void outer_tile(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int count, T* c,
                int64_t cols, int skip) {
  constexpr int L = lanes<T>;
  Num<T> sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = Num<T>{};
  }
  for (int p = 0; p < count; ++p) {
    Num<T> row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) row[j] = load(b + j * L);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Num<T> x = all(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] += x * row[j];
    }
    a += a_pitch;
    b += b_pitch;
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

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
