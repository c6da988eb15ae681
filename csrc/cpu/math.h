// exp, expm1, log, tanh, erf, sin, cos and their kin for vectors of floats or doubles.
//
// Errors in ulp, at most, held by tests/csrc/test_math.py on every instruction set in float and
// double: exp 1.25, log 1, log1p 1.5, sin and cos 1.6 (the C library's past 1e5 in float, 1e6 in
// double), expm1 2.25, softplus 2.5, tanh 3, sigmoid 3.25; erf 2 ulp of 1.
// Denormal numbers count as such, infinities and what is not a number give what libm gives, unless a
// function's comment narrows its domain. The sign of a zero is kept by sin alone.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastmeta::FASTMETA_NAMESPACE {

// Written without templates, because GCC drops a vector's size where it depends on a parameter.
typedef float Floats __attribute__((vector_size(FASTMETA_BYTES)));
typedef double Doubles __attribute__((vector_size(FASTMETA_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FASTMETA_BYTES)));
typedef int64_t Longs __attribute__((vector_size(FASTMETA_BYTES)));
typedef double TwiceDoubles __attribute__((vector_size(2 * FASTMETA_BYTES)));

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

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool has_fma = true;
#else
constexpr bool has_fma = false;
#endif

// a * b + c rounded once, whatever -ffp-contract says: a loop that becomes one instruction.
template <class Num>
Num fused(Num a, Num b, Num c) {
  using S = Lane<Num>;
  constexpr int count = sizeof(Num) / sizeof(S);
  S as[count], bs[count], cs[count];
  __builtin_memcpy(as, &a, sizeof as);
  __builtin_memcpy(bs, &b, sizeof bs);
  __builtin_memcpy(cs, &c, sizeof cs);
  for (int i = 0; i < count; ++i) {
    if constexpr (sizeof(S) == 8) {
      cs[i] = __builtin_fma(as[i], bs[i], cs[i]);
    } else {
      cs[i] = __builtin_fmaf(as[i], bs[i], cs[i]);
    }
  }
  __builtin_memcpy(&c, cs, sizeof c);
  return c;
}

// Whether x exceeds the limit in any lane; what is not a number does not.
template <class Num>
bool any_above(Num x, Lane<Num> limit) {
#if FASTMETA_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(Lane<Num>) == 8) {
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(limit), _CMP_GT_OQ) != 0;
  } else {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
  }
#elif FASTMETA_BYTES == 32 && defined(__AVX__)
  return _mm256_movemask_ps((__m256)(x > limit)) != 0;
#elif FASTMETA_BYTES == 16 && defined(__SSE2__)
  return _mm_movemask_ps((__m128)(x > limit)) != 0;
#else
  const auto above = x > limit;
  int64_t parts[sizeof above / 8], any = 0;
  __builtin_memcpy(parts, &above, sizeof parts);
  for (int64_t part : parts) any |= part;
  return any != 0;
#endif
}

// x - n pi/2 by Cody and Waite's reduction, for |x| up to 1e5 in float and 1e6 in double. Its error
// is below one ulp of the result, however near x is to a multiple of pi/2.
template <class Num>
Num less_quarter_turns(Num x, Num n) {
  using S = Lane<Num>;
  constexpr bool wide = sizeof(S) == 8;
  if constexpr (has_fma) {
    constexpr S high = wide ? S(0x1.921fb54442d18p+0) : S(0x1.921fb6p+0f);
    constexpr S middle = wide ? S(0x1.1a62633145c07p-54) : S(-0x1.777a5cp-25f);
    constexpr S low = wide ? S(-0x1.f1976b7ed8fbcp-110) : S(-0x1.ee59dap-50f);
    const Num first = fused(-n, Num{} + high, x);
    return fused(-n, Num{} + low, fused(-n, Num{} + middle, first));
  } else if constexpr (wide) {
    // The first three parts have 33 bits and n has 20, so that their products are exact; what the
    // second difference rounds off goes into the sum of the small terms.
    const Num first = x - n * 0x1.921fb544p+0, middle = n * 0x1.0b4611a6p-34;
    const Num r = first - middle, rest = (first - r) - middle;
    return r + ((rest - n * 0x1.3198a2ep-69) - n * 0x1.b839a252049c1p-104);
  } else {
    // With exact products in float there would be eight parts; in double there are two.
    const TwiceDoubles twice = __builtin_convertvector(n, TwiceDoubles);
    const TwiceDoubles first = __builtin_convertvector(x, TwiceDoubles) - twice * 0x1.921fb544p+0;
    return __builtin_convertvector(first - twice * 0x1.0b4611a626331p-34, Num);
  }
}

// Replaces the lanes where |x| exceeds the limit by what the C library computes in double.
template <class Num>
[[gnu::noinline, gnu::cold]] void sine_and_cosine_above(const Num& x, Lane<Num> limit, Num& sine,
                                                        Num& cosine) {
  using S = Lane<Num>;
  for (unsigned i = 0; i < sizeof(Num) / sizeof(S); ++i) {
    if (!(__builtin_fabs(x[i]) > limit)) continue;
    sine[i] = S(__builtin_sin(x[i]));
    cosine[i] = S(__builtin_cos(x[i]));
  }
}

// |x| = n pi/2 + r with |r| <= pi/4; the last two bits of n give the order and the signs of sin r
// and cos r. The polynomials are minimax in relative error, by Remez's algorithm, run again for the
// rest after each coefficient's rounding; up to 0.795, since n is rounded from an inexact product.
template <class Num>
void sine_and_cosine(Num x, Num& sine, Num& cosine) {
  using F = Format<Num>;
  using S = typename F::S;
  using Bits = typename F::Bits;
  constexpr int top = sizeof(S) * 8 - 1;
  constexpr S limit = F::wide ? S(1e6) : S(1e5);
  const Num size = absolute(x);
  const Num shifted = size * S(0x1.45f306dc9c883p-1) + F::magic;
  const Num r = less_quarter_turns(size, shifted - F::magic);
  const Num square = r * r;
  Num s, c;
  if constexpr (F::wide) {
    s = square * 0x1.5d75c9096d10fp-33 - 0x1.ae5e022109c46p-26;
    s = s * square + 0x1.71de34f8df86ap-19;
    s = s * square - 0x1.a01a019b80a93p-13;
    s = s * square + 0x1.111111110f3ffp-7;
    s = s * square - 0x1.5555555555546p-3;
    c = square * -0x1.8f8b72ccb7abfp-37 + 0x1.1ee9a7a695224p-29;
    c = c * square - 0x1.27e4f7a4eb93fp-22;
    c = c * square + 0x1.a01a019c24ec6p-16;
    c = c * square - 0x1.6c16c16c14bcfp-10;
    c = c * square + 0x1.5555555555549p-5;
  } else {
    s = square * -0x1.9919ep-13f + 0x1.1106c2p-7f;
    s = s * square - 0x1.555544p-3f;
    c = square * 0x1.99db8ep-16f - 0x1.6c0c0ep-10f;
    c = c * square + 0x1.55554ap-5f;
  }
  s = s * (r * square) + r;
  c = (c * square - S(0.5)) * square + S(1);
  const Bits n = (Bits)shifted, odd = n << top, half = n << (top - 1), sign = (Bits{} + 1) << top;
  sine = (Num)((Bits)select(odd < 0, c, s) ^ ((half ^ (Bits)x) & sign));
  cosine = (Num)((Bits)select(odd < 0, s, c) ^ ((half ^ odd) & sign));
  if (__builtin_expect(any_above(size, limit), 0)) {
    // Copies, so that only they need an address.
    const Num argument = x;
    Num whole_sine = sine, whole_cosine = cosine;
    sine_and_cosine_above(argument, limit, whole_sine, whole_cosine);
    sine = whole_sine, cosine = whole_cosine;
  }
}

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
