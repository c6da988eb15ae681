// Sums over the lanes of vectors.
#pragma once

#include "transpose.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// In each of log2(width) rounds the halves of two rows' sums meet in one row.
template <int Half, class Num>
__attribute__((always_inline)) inline void add_halves(Num* rows) {
  if constexpr (Half > 0) {
    using Bits = typename Parts<Num>::Bits;
    const Bits lane = iota<Num>();
    // Indices from `width` on are those of the second row.
    const Bits low = (lane & Half) == 0 ? lane : lane - Half + width_of<Num>, high = low + Half;
#pragma GCC unroll 16
    for (int i = 0; i < Half; ++i) {
      const Num a = rows[i], b = rows[i + Half];
      rows[i] = shuffle(a, b, low) + shuffle(a, b, high);
    }
    add_halves<Half / 2>(rows);
  }
}

// The sums over the lanes of as many vectors as there are lanes, side by side; these are lost.
template <class Num>
__attribute__((always_inline)) inline Num lane_sums(Num* rows) {
  add_halves<width_of<Num> / 2>(rows);
  return rows[0];
}

// The same of vectors times `weight`.
template <class Num>
__attribute__((always_inline)) inline Num lane_sums(const Num* vectors, Num weight) {
  constexpr int width = width_of<Num>;
  Num rows[width];
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) rows[i] = vectors[i] * weight;
  return lane_sums(rows);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
