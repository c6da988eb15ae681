// Whether the inner loop can be run backward.

#include "reversible.h"

#include <algorithm>
#include <cmath>

namespace fastmeta {
namespace {

constexpr double kMostMagnified = 10;

}  // namespace

template <class T>
bool can_go_back(const Description& network, const Layout& layout, const T* rates) {
  if (!network.reversible || network.prox == 0) return true;
  const int64_t count =
      network.elementwise_rates ? layout.parameters : kTensors * network.layers.size();
  for (int64_t i = 0; i < count; ++i) {
    double magnified = 1;
    // Step 0 is not gone back: theta_0 is kept.
    for (int k = network.steps - 1; k > 0; --k) {
      magnified /= std::abs(1 - network.prox * double(rates[k * count + i]));
      if (!(magnified <= kMostMagnified)) return false;
      magnified = std::max(magnified, 1.0);
    }
  }
  return true;
}

template bool can_go_back(const Description&, const Layout&, const float*);
template bool can_go_back(const Description&, const Layout&, const double*);

}  // namespace fastmeta
