// Winograd's transforms F(m, 3) of a line, m = 2 or 4: a line of m outputs y of taps w over m + 2
// inputs d is y = A' (G w * B' d), with m + 2 products.
// Lavin and Gray (2016), Fast algorithms for convolutional neural networks.
#pragma once

#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T, int M>
struct Rules;

// By the points 0, 1, -1 and infinity.
template <class T>
struct Rules<T, 2> {
  using N = Num<T>;
  // B' d
  [[gnu::always_inline]] static void inputs(const N* d, N* to) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
  }
  // A' m
  [[gnu::always_inline]] static void outputs(const N* m, N* to) {
    to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] - m[3];
  }
  // A e
  [[gnu::always_inline]] static void derivatives(const N* e, N* to) {
    to[0] = e[0], to[1] = e[0] + e[1], to[2] = e[0] - e[1], to[3] = -e[1];
  }
  // G w
  [[gnu::always_inline]] static void weight(const N* w, N* to) {
    const N outer = T(0.5) * (w[0] + w[2]), inner = T(0.5) * w[1];
    to[0] = w[0], to[1] = outer + inner, to[2] = outer - inner, to[3] = w[2];
  }
  // G' u
  [[gnu::always_inline]] static void weight_back(const N* u, N* to) {
    const N sum = T(0.5) * (u[1] + u[2]);
    to[0] = u[0] + sum, to[1] = T(0.5) * (u[1] - u[2]), to[2] = sum + u[3];
  }
};

// By the points 0, +-sqrt(1/2), +-sqrt(2) and infinity, which round less than 0, +-1, +-2 do.
template <class T>
struct Rules<T, 4> {
  using N = Num<T>;
  static constexpr T kNear = T(0.70710678118654752440), kFar = T(1.41421356237309504880);
  [[gnu::always_inline]] static void inputs(const N* d, N* to) {
    const N even = d[4] - T(2) * d[2], odd = kNear * (d[3] - T(2) * d[1]);
    const N far_even = d[4] - T(0.5) * d[2], far_odd = kFar * (d[3] - T(0.5) * d[1]);
    to[0] = d[0] + d[4] - T(2.5) * d[2];
    to[1] = even + odd, to[2] = even - odd;
    to[3] = far_even + far_odd, to[4] = far_even - far_odd;
    to[5] = d[1] + d[5] - T(2.5) * d[3];
  }
  [[gnu::always_inline]] static void outputs(const N* m, N* to) {
    const N near_sum = m[1] + m[2], near_apart = kNear * (m[1] - m[2]);
    const N far_sum = m[3] + m[4], far_apart = kFar * (m[3] - m[4]);
    to[0] = m[0] + near_sum + far_sum;
    to[1] = near_apart + far_apart;
    to[2] = T(0.5) * near_sum + T(2) * far_sum;
    to[3] = T(0.5) * near_apart + T(2) * far_apart + m[5];
  }
  [[gnu::always_inline]] static void derivatives(const N* e, N* to) {
    const N even = e[0] + T(0.5) * e[2], odd = kNear * (e[1] + T(0.5) * e[3]);
    const N far_even = e[0] + T(2) * e[2], far_odd = kFar * (e[1] + T(2) * e[3]);
    to[0] = e[0];
    to[1] = even + odd, to[2] = even - odd;
    to[3] = far_even + far_odd, to[4] = far_even - far_odd;
    to[5] = e[3];
  }
  [[gnu::always_inline]] static void weight(const N* w, N* to) {
    const N even = T(-2. / 3) * (w[0] + T(0.5) * w[2]), odd = T(-2. / 3) * kNear * w[1];
    const N far_even = T(1. / 6) * (w[0] + T(2) * w[2]), far_odd = T(1. / 6) * kFar * w[1];
    to[0] = w[0];
    to[1] = even + odd, to[2] = even - odd;
    to[3] = far_even + far_odd, to[4] = far_even - far_odd;
    to[5] = w[2];
  }
  [[gnu::always_inline]] static void weight_back(const N* u, N* to) {
    const N sum = T(-2. / 3) * (u[1] + u[2]), far_sum = T(1. / 6) * (u[3] + u[4]);
    to[0] = u[0] + sum + far_sum;
    to[1] = T(-2. / 3) * kNear * (u[1] - u[2]) + T(1. / 6) * kFar * (u[3] - u[4]);
    to[2] = T(0.5) * sum + T(2) * far_sum + u[5];
  }
};

// A rule over the columns of [From, From], then over the rows: put(i, j, number) for [To, To] of
// what take(i, j) gives. All in registers, where GCC would call the rules by itself.
template <auto rule, class T, int From, int To, class Take, class Put>
[[gnu::always_inline]] inline void over_both(Take take, Put put) {
  Num<T> half[To][From];
#pragma GCC unroll 8
  for (int j = 0; j < From; ++j) {
    Num<T> column[From], made[To];
#pragma GCC unroll 8
    for (int i = 0; i < From; ++i) column[i] = take(i, j);
    rule(column, made);
#pragma GCC unroll 8
    for (int i = 0; i < To; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < To; ++i) {
    Num<T> made[To];
    rule(half[i], made);
#pragma GCC unroll 8
    for (int j = 0; j < To; ++j) put(i, j, made[j]);
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
