// exp, expm1, log, tanh, erf, sin, cos and their kin for vectors of floats or doubles.
//
// Errors in ulp, at most, held by tests/csrc/test_math.py on every instruction set in float and
// double: exp 1.25, log 1, log1p 1.5, expm1 2.25, softplus 2.5, tanh 3, sigmoid 3.25; erf 2 ulp of 1;
// sin and cos 1 ulp of 1 (2.25 of their own where above 1e-3), within `kLargestAngle`.
// Denormal numbers count as such, infinities and what is not a number give what libm gives, unless a
// function's comment narrows its domain. The sign of a zero is not kept.
#pragma once

#include <cstdint>

namespace fastmeta::FASTMETA_NAMESPACE {

// Written without templates, because GCC drops a vector's size where it depends on a parameter.
typedef float Floats __attribute__((vector_size(FASTMETA_BYTES)));
typedef double Doubles __attribute__((vector_size(FASTMETA_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FASTMETA_BYTES)));
typedef int64_t Longs __attribute__((vector_size(FASTMETA_BYTES)));

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using type = Floats;
};
template <>
struct Vector<double> {
  using type = Doubles;
};

template <class Num>
struct Parts;
template <>
struct Parts<Floats> {
  using Scalar = float;
  using Bits = Ints;
};
template <>
struct Parts<Doubles> {
  using Scalar = double;
  using Bits = Longs;
};
template <class Num>
using Lane = typename Parts<Num>::Scalar;

// What the two formats differ in.
template <class Num>
struct Format {
  static constexpr bool wide = sizeof(Lane<Num>) == 8;
  using S = Lane<Num>;
  using Bits = typename Parts<Num>::Bits;
  static constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127;
  // Adding this rounds to a whole number, which then stands in the low bits.
  static constexpr S magic = wide ? S(6755399441055744.0) : S(12582912.0f);
  static constexpr S largest = wide ? S(709.8) : S(88.8), smallest = wide ? S(-746) : S(-104);
  // ln 2 in two parts, the first with zeros enough for an exact product.
  static constexpr S ln2_high = wide ? S(0x1.62e42fefap-1) : S(0.693359375f);
  static constexpr S ln2_low = wide ? S(0x1.cf79abc9e3b39p-40) : S(-2.12194440054690583e-4);
};

template <class Mask, class Num>
Num select(Mask mask, Num a, Num b) {
  return mask ? a : b;
}
// Where one side is not a number, the first is taken.
template <class Num>
Num maximum(Num a, Num b) {
  return select(a < b, b, a);
}
template <class Num>
Num minimum(Num a, Num b) {
  return select(b < a, b, a);
}
// A loop that the compiler turns into one instruction, with -fno-math-errno.
template <class Num>
Num sqrt(Num x) {
  using S = Lane<Num>;
  constexpr int count = sizeof(Num) / sizeof(S);
  S parts[count];
  __builtin_memcpy(parts, &x, sizeof parts);
  for (int i = 0; i < count; ++i) parts[i] = S(__builtin_sqrt(parts[i]));
  __builtin_memcpy(&x, parts, sizeof parts);
  return x;
}
template <class Num>
Num absolute(Num x) {
  using Bits = typename Format<Num>::Bits;
  return (Num)((Bits)x & ~((Bits{} + 1) << (sizeof(Lane<Num>) * 8 - 1)));
}

// 2^n for whole n in the range of normal numbers.
template <class Num>
Num power_of_two(typename Format<Num>::Bits n) {
  return (Num)((n + Format<Num>::bias) << Format<Num>::mantissa);
}

// x = n ln 2 + r with |r| <= ln 2 / 2; returns exp(r) - 1 by its Taylor series.
template <class Num>
Num reduced_expm1(Num x, typename Format<Num>::Bits& n) {
  using F = Format<Num>;
  using S = typename F::S;
  const Num shifted = x * S(1.44269504088896340736) + F::magic;
  const Num whole = shifted - F::magic;
  n = (typename F::Bits)shifted - (typename F::Bits)(Num{} + F::magic);
  const Num r = (x - whole * F::ln2_high) - whole * F::ln2_low;
  constexpr int terms = F::wide ? 13 : 7;
  constexpr double inverse_factorials[14] = {1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600,
      1. / 6227020800};
  Num sum = Num{} + S(inverse_factorials[terms]);
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 2; --i) sum = sum * r + S(inverse_factorials[i]);
  return sum * r * r + r;
}

template <class Num>
Num exp(Num x) {
  using F = Format<Num>;
  using S = typename F::S;
  // Where x is not a number the comparisons are false, and it passes through.
  const Num inside = select(x > F::largest, Num{} + F::largest,
                            select(x < F::smallest, Num{} + F::smallest, x));
  typename F::Bits n;
  const Num e = reduced_expm1(inside, n) + S(1);
  const typename F::Bits half = n >> 1;  // two factors: 2^n itself may be out of range
  return e * power_of_two<Num>(half) * power_of_two<Num>(n - half);
}

// exp(x) - 1 for x up to 88.37, or 709.43 in double: past that 2^n is out of range.
template <class Num>
Num expm1(Num x) {
  using F = Format<Num>;
  using S = typename F::S;
  const S floor = F::wide ? S(-40) : S(-20);  // -1 to rounding
  typename F::Bits n;
  const Num e = reduced_expm1(select(x < floor, Num{} + floor, x), n);
  const Num scale = power_of_two<Num>(n);
  return scale * e + (scale - S(1));
}

// log x for positive normal x, by atanh((m - 1) / (m + 1)) of the mantissa m.
template <class Num>
Num log(Num x) {
  using F = Format<Num>;
  using S = typename F::S;
  using Bits = typename F::Bits;
  const Bits bits = (Bits)x;
  Bits n = (bits >> F::mantissa) - F::bias;
  const Bits one = (Bits)(Num{} + S(1));
  Num m = (Num)((bits & (((Bits{} + 1) << F::mantissa) - 1)) | one);
  const auto upper = m > S(1.41421356237309504880);
  m = select(upper, m * S(0.5), m);
  n = n - (Bits)upper;  // a mask is -1
  const Num f = m - S(1), s = f / (m + S(1)), square = s * s;
  constexpr int terms = F::wide ? 11 : 5;
  Num sum = Num{} + S(1.0 / (2 * terms + 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 1; --i) sum = sum * square + S(1.0 / (2 * i + 1));
  // log m = 2 s + 2 s^3 (1/3 + ...), with 2 s = f - s f for one rounding less
  const Num tail = S(2) * s * square * sum;
  const Num whole = __builtin_convertvector(n, Num);
  const Num result = whole * F::ln2_high + (f - (s * f - (tail + whole * F::ln2_low)));
  return select(x > S(0) && x <= (sizeof(S) == 8 ? S(1.7976931348623157e308) : S(3.4028235e38f)),
                result, x * S(2) - x);
}

// log(1 + u) for u in [0, 1].
template <class Num>
Num log1p(Num u) {
  using S = Lane<Num>;
  const Num w = u + S(1);
  return log(w) + (u - (w - S(1))) / w;
}

template <class Num>
Num tanh(Num x) {
  using S = Lane<Num>;
  const S most = sizeof(S) == 8 ? S(20) : S(10);  // 1 to rounding
  const Num size = absolute(x);
  const Num e = expm1(S(2) * select(size > most, Num{} + most, size));
  const Num t = e / (e + S(2));
  return select(x < S(0), -t, t);
}

template <class Num>
Num sigmoid(Num x) {
  using S = Lane<Num>;
  const Num e = exp(-absolute(x)), upper = S(1) / (S(1) + e);
  return select(x < S(0), e * upper, upper);
}

// log(1 + exp x)
template <class Num>
Num softplus(Num x) {
  return maximum(x, Num{}) + log1p(exp(-absolute(x)));
}

// Below 1 by the Taylor series; above, 1 - exp(-x^2) p(u), p the Chebyshev expansion of
// exp(x^2) erfc(x) in u = (x - 2) / (x + 2).
template <class Num>
Num erf(Num x) {
  using S = Lane<Num>;
  constexpr bool wide = sizeof(S) == 8;
  const Num size = absolute(x), square = x * x;
  constexpr int terms = wide ? 19 : 10;
  S coefficients[20] = {};
  double factorial = 1;
  for (int i = 0; i <= terms; ++i) {
    coefficients[i] = S(1.12837916709551257390 / factorial / (2 * i + 1));
    factorial *= -(i + 1);
  }
  Num series = Num{} + coefficients[terms];
#pragma GCC unroll 20
  for (int i = terms - 1; i >= 0; --i) series = series * square + coefficients[i];
  constexpr double chebyshev[23] = {
      0.37737609962586129214, -0.48250911965067726064, 0.12232459533097994244,
      -0.017831149719274760427, 0.00032117365249535033013, 0.00035039525647938909139,
      -0.000022438806507581074803, -0.000010537433121735203945, 5.6713311014038951302e-7,
      4.2976815413157588209e-7, 5.1049489441885348788e-9, -1.8899702541661746577e-8,
      -2.2427580679933506738e-9, 6.8552384943208974346e-10, 2.1487912027741185373e-10,
      -5.514729815129643804e-12, -1.3475741772026901046e-11, -2.0837585946692293709e-12,
      4.5140831989020606964e-13, 2.3030202643642950352e-13, 2.1834092165241983384e-14,
      -8.6682652040335233954e-15, -1.9548489045084677017e-15};
  const Num u = (size - S(2)) / (size + S(2));
  Num next{}, after{};
#pragma GCC unroll 24
  for (int i = wide ? 22 : 11; i >= 1; --i) {
    const Num here = S(2) * u * next - after + S(chebyshev[i]);
    after = next, next = here;
  }
  const Num scaled = u * next - after + S(chebyshev[0]);
  const Num above = S(1) - exp(-square) * scaled;
  const Num far = select(size > S(6), Num{} + S(1), above);
  return select(size < S(1), x * series, select(x < S(0), -far, select(x > S(0), far, x)));
}

// The largest |x| that `sine_and_cosine` takes: up to there whole multiples of pi / 2's first parts
// are exact.
template <class Num>
constexpr Lane<Num> kLargestAngle = Format<Num>::wide ? Lane<Num>(1e5) : Lane<Num>(1.2e4);

// sin x and cos x: x - n pi / 2 in parts of pi / 2, then the two near-minimax polynomials in r^2 on
// |r| <= pi / 4 (Chebyshev expansions of (sin r / r - 1) / r^2 and (cos r - 1 + r^2 / 2) / r^4).
template <class Num>
void sine_and_cosine(Num x, Num& sine, Num& cosine) {
  using F = Format<Num>;
  using S = typename F::S;
  using Bits = typename F::Bits;
  const Num shifted = x * S(0.63661977236758134308) + F::magic, n = shifted - F::magic;
  Num r;
  if constexpr (F::wide) {
    r = ((x - n * S(0x1.921fb544p+0)) - n * S(0x1.0b4611a6p-34)) - n * S(0x1.3198a2e037073p-69);
  } else {
    r = ((x - n * S(0x1.92p+0f)) - n * S(0x1.fb4p-12f)) - n * S(0x1.444p-24f);
    r = r - n * S(0x1.68c234p-39f);
  }
  constexpr int terms = F::wide ? 6 : 3;
  constexpr double of_sine[2][6] = {
      {-0.16666664661714698465, 0.008332748154085032145, -0.00019587865702101875127},
      {-0.16666666666666664622, 0.0083333333333309472945, -0.00019841269836756772528,
       2.7557316101617874437e-6, -2.505113165023518147e-8, 1.5918115263265975194e-10}};
  constexpr double of_cosine[2][6] = {
      {0.041666664658901403725, -0.0013888302919113632806, 0.000024547916853691016927},
      {0.041666666666666665388, -0.0013888888888887396492, 0.000024801587298764560771,
       -2.7557317271145145962e-7, 2.0876146146558611582e-9, -1.1382623647474604629e-11}};
  const Num z = r * r;
  Num p = Num{} + S(of_sine[F::wide][terms - 1]), q = Num{} + S(of_cosine[F::wide][terms - 1]);
#pragma GCC unroll 8
  for (int i = terms - 2; i >= 0; --i) {
    p = p * z + S(of_sine[F::wide][i]);
    q = q * z + S(of_cosine[F::wide][i]);
  }
  const Num of_r = r * z * p + r, by_r = z * z * q + (S(1) - S(0.5) * z);
  // n's last bits say which of the two it is, and its sign.
  const Bits quarter = (Bits)shifted;
  const auto odd = (quarter & 1) != 0;
  constexpr int top = sizeof(S) * 8 - 2;
  sine = (Num)((Bits)select(odd, by_r, of_r) ^ ((quarter & 2) << top));
  cosine = (Num)((Bits)select(odd, of_r, by_r) ^ (((quarter + 1) & 2) << top));
}
// Of those, one: the other's part is not computed where this is inlined.
template <class Num>
Num sin(Num x) {
  Num sine, cosine;
  sine_and_cosine(x, sine, cosine);
  return sine;
}
template <class Num>
Num cos(Num x) {
  Num sine, cosine;
  sine_and_cosine(x, sine, cosine);
  return cosine;
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
