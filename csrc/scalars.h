// The functions that layers and losses apply to a scalar, where an engine's values are scalars.
#pragma once

#include <cmath>

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class T> FASTMETA_DEVICE T select(bool condition, T a, T b) { return condition ? a : b; }
template <class T> FASTMETA_DEVICE T maximum(T a, T b) { return a < b ? b : a; }
template <class T> FASTMETA_DEVICE T minimum(T a, T b) { return b < a ? b : a; }
template <class T> FASTMETA_DEVICE T absolute(T a) { return std::abs(a); }
template <class T> FASTMETA_DEVICE T sigmoid(T x) { return 1 / (1 + std::exp(-x)); }
template <class T> FASTMETA_DEVICE T softplus(T x) {
  return maximum(x, T(0)) + std::log1p(std::exp(-std::abs(x)));
}
template <class T> FASTMETA_DEVICE void sine_and_cosine(T x, T& sine, T& cosine) {
  sine = std::sin(x);
  cosine = std::cos(x);
}
using std::cos;
using std::erf;
using std::exp;
using std::expm1;
using std::log;
using std::log1p;
using std::sin;
using std::sqrt;
using std::tanh;

}  // namespace fastmeta::FASTMETA_NAMESPACE
