// The functions of csrc/cpu/math.h over arrays, and the same in long double: test_math.py calls it.
#include <cmath>
#include <cstdint>

#include "cpu/math.h"

namespace {

using namespace fastmeta::FASTMETA_NAMESPACE;

template <class T, class F>
void over(F f, const T* in, T* out, int64_t count) {
  using Num = typename Vector<T>::type;
  constexpr int lanes = sizeof(Num) / sizeof(T);
  for (int64_t i = 0; i < count; i += lanes) {
    Num x{};
    for (int lane = 0; lane < lanes && i + lane < count; ++lane) x[lane] = in[i + lane];
    const Num y = f(x);
    for (int lane = 0; lane < lanes && i + lane < count; ++lane) out[i + lane] = y[lane];
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
Real sin(Real x) { return std::sin(x); }
Real cos(Real x) { return std::cos(x); }
Real sigmoid(Real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
Real softplus(Real x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

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

FUNCTION(exp)
FUNCTION(expm1)
FUNCTION(log)
FUNCTION(log1p)
FUNCTION(tanh)
FUNCTION(sigmoid)
FUNCTION(softplus)
FUNCTION(erf)
FUNCTION(sin)
FUNCTION(cos)
