// The functions of csrc/cpu/math.h over arrays, and the same in long double: test_math.py calls it.
// Without FASTMETA_BYTES, those of csrc/scalars.h that the C library computes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(FASTMETA_BYTES)
#include "cpu/math.h"
#else
#include "scalars.h"
#endif
#include "cpu/gamma.h"

namespace {

using namespace fastmeta::FASTMETA_NAMESPACE;

#if !defined(FASTMETA_BYTES)
using Floats = float;
using Doubles = double;
template <class T>
struct Vector {
  using type = T;
};
#endif

template <class Num>
Num sine_of_both(Num x) {
  Num sine, cosine;
  sine_and_cosine(x, sine, cosine);
  return sine;
}
template <class Num>
Num cosine_of_both(Num x) {
  Num sine, cosine;
  sine_and_cosine(x, sine, cosine);
  return cosine;
}

#if defined(FASTMETA_BYTES)
template <class Num>
Num tanh_of_softplus(Num x) {
  return tanh_softplus<Lane<Num>>(x);
}
template <class Num>
Num sigmoid_beside(Num x) {
  Num value, sigmoid;
  tanh_softplus_and_sigmoid<Lane<Num>>(x, value, sigmoid);
  return sigmoid;
}
#endif

template <class T, class F>
void over(F f, const T* in, T* out, int64_t count) {
  using Num = typename Vector<T>::type;
  constexpr int lanes = sizeof(Num) / sizeof(T);
  for (int64_t i = 0; i < count; i += lanes) {
    const auto bytes = std::min<int64_t>(lanes, count - i) * sizeof(T);
    Num x{};
    std::memcpy(&x, in + i, bytes);
    const Num y = f(x);
    std::memcpy(out + i, &y, bytes);
  }
}

namespace exact {

using Real = long double;

Real exp(Real x) { return std::exp(x); }
Real expm1(Real x) { return std::expm1(x); }
Real log(Real x) { return std::log(x); }
Real log1p(Real x) { return std::log1p(x); }
Real tanh(Real x) { return std::tanh(x); }
Real erf(Real x) { return std::erf(x); }
Real sigmoid(Real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
Real softplus(Real x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
Real tanh_of_softplus(Real x) { return std::tanh(softplus(x)); }
Real sigmoid_beside(Real x) { return sigmoid(x); }
Real sin(Real x) { return std::sin(x); }
Real cos(Real x) { return std::cos(x); }
Real sine_of_both(Real x) { return std::sin(x); }
Real cosine_of_both(Real x) { return std::cos(x); }

}  // namespace exact
}  // namespace

#define FUNCTION(name)                                                             \
  extern "C" void name##_float32(const float* in, float* out, int64_t count) {     \
    over([](Floats x) { return name(x); }, in, out, count);                        \
  }                                                                                \
  extern "C" void name##_float64(const double* in, double* out, int64_t count) {   \
    over([](Doubles x) { return name(x); }, in, out, count);                       \
  }                                                                                \
  extern "C" void name##_exact(const double* in, long double* out, int64_t count) { \
    for (int64_t i = 0; i < count; ++i) out[i] = exact::name(in[i]);               \
  }

FUNCTION(sin)
FUNCTION(cos)
FUNCTION(sine_of_both)
FUNCTION(cosine_of_both)
#if defined(FASTMETA_BYTES)
FUNCTION(exp)
FUNCTION(expm1)
FUNCTION(log)
FUNCTION(log1p)
FUNCTION(tanh)
FUNCTION(sigmoid)
FUNCTION(softplus)
FUNCTION(tanh_of_softplus)
FUNCTION(sigmoid_beside)
FUNCTION(erf)
#endif

#define FUNCTION_OF_ALL(name)                                                     \
  extern "C" void name##_float32(const float* in, float* out, int64_t count) {    \
    over([](Floats x) { return name<float>(x); }, in, out, count);                \
  }                                                                               \
  extern "C" void name##_float64(const double* in, double* out, int64_t count) {  \
    over([](Doubles x) { return name<double>(x); }, in, out, count);              \
  }

FUNCTION_OF_ALL(log_gamma)
FUNCTION_OF_ALL(digamma)
FUNCTION_OF_ALL(trigamma)
