// Functions of expressions over all numbers, where those of math.h are narrower.
#pragma once

#include <cmath>

#include "../network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class S, class Num>
Num log_of_all(Num x) {
  const S smallest = sizeof(S) == 8 ? S(0x1p-1022) : S(0x1p-126);
  const S up = sizeof(S) == 8 ? S(0x1p54) : S(0x1p24), back = sizeof(S) == 8 ? S(54) : S(24);
  const auto denormal = x < smallest;
  const Num normal = log(select(denormal, x * up, x));
  const Num found = select(denormal, normal - back * S(0.69314718055994530942), normal);
  const S infinity = S(1) / S(0);
  const Num above = select(x < infinity, found, x);
  return select(x > S(0), above, select(x == S(0), Num{} - infinity, x - x + S(0) / (x - x)));
}
template <class S, class Num>
Num log1p_of_all(Num u) {
  const Num w = u + S(1);
  const Num found = log(w) + (u - (w - S(1))) / w;
  return select(w > S(0), select(w - w == S(0), found, w), log_of_all<S>(w));
}
template <class S, class Num>
Num expm1_of_all(Num x) {
  const S most = sizeof(S) == 8 ? S(700) : S(80);
  return select(x > most, exp(x), expm1(select(x > most, Num{} + most, x)));
}
template <class S, class Num>
Num power_of_all(Num a, Num b) {
  constexpr int lanes = sizeof(Num) / sizeof(S);
  S x[lanes], y[lanes];
  __builtin_memcpy(x, &a, sizeof a);
  __builtin_memcpy(y, &b, sizeof b);
  for (int i = 0; i < lanes; ++i) x[i] = std::pow(x[i], y[i]);
  __builtin_memcpy(&a, x, sizeof a);
  return a;
}

// log(1 + exp x) and its derivative, by one exponential.
template <class S, class Num>
void softplus_and_sigmoid(Num x, Num& softplus, Num& sigmoid) {
  const Num e = exp(-absolute(x)), upper = S(1) / (S(1) + e);
  sigmoid = select(x < S(0), e * upper, upper);
  softplus = maximum(x, Num{}) + log1p(e);
}

// tanh(log(1 + exp x)) = n / (n + 2), n = e (e + 2), and the derivative of what tanh takes, by one
// exponential and one division, to 5 and 4 ulp; from `most` on both are 1.
template <class S, class Num>
void tanh_softplus_and_sigmoid(Num x, Num& value, Num& sigmoid) {
  constexpr S most = sizeof(S) == 8 ? S(40) : S(20);
  const Num e = exp(select(x > most, Num{} + most, x)), n = e * (e + S(2));
  const Num above = S(1) + e, each = S(1) / ((n + S(2)) * above);
  value = n * above * each;
  sigmoid = e * (n + S(2)) * each;
}
template <class S, class Num>
Num tanh_softplus(Num x) {
  Num value, sigmoid;
  tanh_softplus_and_sigmoid<S>(x, value, sigmoid);
  return value;
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
