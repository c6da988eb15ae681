// Between torch's tensors and blocks of parameters.
#pragma once

#include <vector>

#include "chain.h"

namespace fastmeta::conv {

// Where torch's tensors lie: the parameters of each block in the order of `Tensor`, and the given
// statistics, mean and 1 / deviation; null where there is none.
template <class T>
struct Addresses {
  std::vector<const T*> parameters, statistics;
  T* gradient;  // the parameters' in their order, then [K, blocks * kTensors] of learned rates
};

// Numbers of that gradient.
int64_t gradient_size(const Network&);

// to: a block of parameters, then the given statistics.
template <class T>
void pack(const Network&, const Layout&, const Addresses<T>&, T* to);

// From a block of derivatives, and those of the rates behind it, to the gradient.
template <class T>
void unpack(const Network&, const Layout&, const T* from, T* gradient);

}  // namespace fastmeta::conv
