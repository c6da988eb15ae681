// Whether the inner loop can be run backward.
#pragma once

#include "network.h"

namespace fastmeta {

// With a proximal term a step back divides by 1 - a prox, and so magnifies what rounding did to the
// weights. Whether that costs a decimal digit at most, for these rates of `Data`.
template <class T>
bool can_go_back(const Description&, const Layout&, const T* rates);

}  // namespace fastmeta
