// Between torch's tensors and blocks of parameters.
#pragma once

#include <vector>

#include "layout.h"

namespace fastmeta::conv {

// Where torch's tensors lie: the parameters of each block in the order of `Tensor`, and the given
// statistics, mean and 1 / deviation; null where there is none.
template <class T>
struct Addresses {
  std::vector<const T*> parameters, statistics;
  std::vector<T*> adapted;  // [T, ...] in the order of the parameters; empty unless asked for
  const T* rates;           // [K, blocks * kTensors], or [K, P] if elementwise
  T* gradient;              // [P], then in the same way of learned rates, then learned options
};

// Numbers of that gradient.
int64_t gradient_size(const Network&);

// Numbers of what pack makes, and of the sums that unpack takes.
int64_t packed_size(const Network&, const Layout&);
int64_t sums_size(const Network&, const Layout&);

// to: a block of parameters, the given statistics, and blocks of elementwise rates.
template <class T>
void pack(const Network&, const Layout&, const Addresses<T>&, T* to);

// From a block of derivatives, and those of the rates behind it, to the gradient.
template <class T>
void unpack(const Network&, const Layout&, const T* from, T* gradient);

// From a block of adapted parameters to a task's place.
template <class T>
void unpack_adapted(const Network&, const Layout&, const T* from, int64_t task,
                    const Addresses<T>&);

}  // namespace fastmeta::conv
