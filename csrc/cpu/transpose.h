// Transposing matrices by square blocks in registers.
#pragma once

#include <cstdint>

#include "math.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// How many lanes a vector has.
template <class Num>
constexpr int width_of = sizeof(Num) / sizeof(Lane<Num>);

// Whose integers are as wide as the lanes of Num: {0, 1, 2, ...}.
template <class Num>
inline typename Parts<Num>::Bits iota() {
  typename Parts<Num>::Bits lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < width_of<Num>; ++i) lanes[i] = i;
  return lanes;
}

// The first `live` lanes; zeros behind them.
template <class Num>
Num load_part(const Lane<Num>* from, int live) {
  Num whole{};
  if (live >= width_of<Num>) {
    __builtin_memcpy(&whole, from, sizeof whole);
  } else {
    for (int i = 0; i < live; ++i) whole[i] = from[i];
  }
  return whole;
}

template <class Num>
void store_part(Lane<Num>* to, Num whole, int live) {
  if (live >= width_of<Num>) {
    __builtin_memcpy(to, &whole, sizeof whole);
  } else {
    for (int i = 0; i < live; ++i) to[i] = whole[i];
  }
}

// Numbers of two vectors, side by side, by constant indices.
template <class Num>
__attribute__((always_inline)) inline Num shuffle(Num a, Num b, typename Parts<Num>::Bits from) {
#if defined(__clang__)
  Num picked;
#pragma GCC unroll 16
  for (int i = 0; i < width_of<Num>; ++i) {
    picked[i] = from[i] < width_of<Num> ? a[from[i]] : b[from[i] - width_of<Num>];
  }
  return picked;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// In each of log2(width) rounds two rows exchange the parts that lie off the diagonal.
template <int Step, class Num>
__attribute__((always_inline)) inline void exchange(Num* rows) {
  constexpr int width = width_of<Num>;
  if constexpr (Step < width) {
    using Bits = typename Parts<Num>::Bits;
    const Bits lane = iota<Num>(), low = (lane & Step) == 0;
    // Indices from `width` on are those of the second row.
    const Bits first = low ? lane : lane - Step + width, second = low ? lane + Step : lane + width;
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
      if (i & Step) continue;
      const Num a = rows[i], b = rows[i + Step];
      rows[i] = shuffle(a, b, first);
      rows[i + Step] = shuffle(a, b, second);
    }
    exchange<2 * Step>(rows);
  }
}

// Calls put(j, i, part): the elements (i ..., j) of a rows x cols matrix, for every column j and
// every width-th row i; zeros where there are no more rows. `Padded`: whole vectors may be read at
// the ends of its rows.
template <bool Padded, class Num, class Put>
__attribute__((always_inline)) inline void transposed_parts(const Lane<Num>* from, int64_t stride,
                                                            int rows, int cols, Put put) {
  constexpr int width = width_of<Num>;
  for (int i = 0; i < rows; i += width) {
    const int live_rows = rows - i < width ? rows - i : width;
    for (int j = 0; j < cols; j += width) {
      const int live_cols = cols - j < width ? cols - j : width;
      Num block[width];
      const Lane<Num>* corner = from + i * stride + j;
      if (live_rows == width && (Padded || live_cols == width)) {
#pragma GCC unroll 16
        for (int r = 0; r < width; ++r) block[r] = load_part<Num>(corner + r * stride, width);
      } else {
        for (int r = 0; r < width; ++r) {
          const int live = r < live_rows ? (Padded ? width : live_cols) : 0;
          block[r] = load_part<Num>(corner + r * stride, live);
        }
      }
      exchange<1>(block);
      for (int c = 0; c < live_cols; ++c) put(j + c, i, block[c]);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
