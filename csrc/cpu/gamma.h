// The logarithm of the gamma function and its first two derivatives, by Stirling's series (NIST DLMF
// 5.11.1), the recurrence below some steps (5.5.1), and the reflection up to 0 (5.5.3). Of vectors or
// scalars; bounds: tests/csrc/test_math.py.
#pragma once

#include "of_all.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// The recurrence takes x up to here: far enough for the series' first omitted term, of log gamma no
// further, because the logarithm of more factors cancels digits.
template <class S>
constexpr int kGammaSteps = sizeof(S) == 8 ? 8 : 3;
template <class S>
constexpr int kDigammaSteps = sizeof(S) == 8 ? 12 : 3;

// x shifted to where the series holds.
template <class S, class Num>
Num gamma_argument(Num x, int steps) {
  return select(x < S(steps), x + S(steps), x);
}

// pi (x - n), n the integer nearest to x: |sin|, cot and sin^2 of it are those of pi x.
template <class S, class Num>
Num turned(Num x) {
  constexpr S kRound = sizeof(S) == 8 ? S(0x1.8p52) : S(0x1.8p23);
  const Num nearest = (x + kRound) - kRound;
  return (x - nearest) * S(3.14159265358979323846);
}

// log gamma(x) for x > 0
template <class S, class Num>
Num log_gamma_above(Num x) {
  const Num y = gamma_argument<S>(x, kGammaSteps<S>), w = S(1) / y, w2 = w * w;
  Num product = x;
  for (int i = 1; i < kGammaSteps<S>; ++i) product *= x + S(i);
  product = select(x < S(kGammaSteps<S>), product, Num{} + S(1));
  const Num series =
      w * (S(1.0 / 12) -
           w2 * (S(1.0 / 360) -
                 w2 * (S(1.0 / 1260) -
                       w2 * (S(1.0 / 1680) -
                             w2 * (S(1.0 / 1188) - w2 * (S(691.0 / 360360) - w2 * S(1.0 / 156)))))));
  const Num found = (y - S(0.5)) * log_of_all<S>(y) - y + S(0.91893853320467274178) + series;
  return select(y - y == S(0), found, y) - log_of_all<S>(product);
}

// Its derivative for x > 0
template <class S, class Num>
Num digamma_above(Num x) {
  const Num y = gamma_argument<S>(x, kDigammaSteps<S>), w = S(1) / y, w2 = w * w;
  Num sum{};
  for (int i = 0; i < kDigammaSteps<S>; ++i) sum += S(1) / (x + S(i));
  sum = select(x < S(kDigammaSteps<S>), sum, Num{});
  const Num series =
      w2 * (S(1.0 / 12) -
            w2 * (S(1.0 / 120) -
                  w2 * (S(1.0 / 252) -
                        w2 * (S(1.0 / 240) -
                              w2 * (S(1.0 / 132) - w2 * (S(691.0 / 32760) - w2 * S(1.0 / 12)))))));
  return log_of_all<S>(y) - S(0.5) * w - series - sum;
}

// And the derivative of that
template <class S, class Num>
Num trigamma_above(Num x) {
  const Num y = gamma_argument<S>(x, kDigammaSteps<S>), w = S(1) / y, w2 = w * w;
  Num sum{};
  for (int i = 0; i < kDigammaSteps<S>; ++i) {
    const Num each = S(1) / (x + S(i));
    sum += each * each;
  }
  sum = select(x < S(kDigammaSteps<S>), sum, Num{});
  const Num series =
      w2 * (S(1.0 / 6) -
            w2 * (S(1.0 / 30) -
                  w2 * (S(1.0 / 42) -
                        w2 * (S(1.0 / 30) -
                              w2 * (S(5.0 / 66) - w2 * (S(691.0 / 2730) - w2 * S(7.0 / 6)))))));
  return w + S(0.5) * w2 + w * series + sum;
}

template <class S, class Num>
Num log_gamma(Num x) {
  const auto below = x <= S(0);
  const Num above = log_gamma_above<S>(select(below, S(1) - x, x));
  const Num sine = absolute(sin(turned<S>(x)));
  return select(below, S(1.14472988584940017414) - log_of_all<S>(sine) - above, above);
}

template <class S, class Num>
Num digamma(Num x) {
  const auto below = x <= S(0);
  const Num above = digamma_above<S>(select(below, S(1) - x, x)), angle = turned<S>(x);
  const Num turn = S(3.14159265358979323846) * cos(angle) / sin(angle);
  // A pole: at a zero, infinity of the sign opposite to the zero's; at negative integers NaN.
  const Num found = select(x - x == S(0), above - turn, turn);
  const Num pole = select(x == S(0), S(-1) / x, S(0) / (angle - angle));
  return select(below, select(angle == S(0), pole, found), above);
}

template <class S, class Num>
Num trigamma(Num x) {
  const auto below = x <= S(0);
  const Num above = trigamma_above<S>(select(below, S(1) - x, x));
  const Num ratio = S(3.14159265358979323846) / sin(turned<S>(x));
  return select(below, ratio * ratio - above, above);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
