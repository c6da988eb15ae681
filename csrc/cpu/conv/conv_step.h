// The convolutional meta-step on this processor: tasks spread over threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastmeta::conv {

// Of an instruction set of cpu::instruction_set, by its name.
Kernels kernels(const std::string& instruction_set);


// Where torch's tensors lie: the parameters of each block in the order of `Tensor`, and the given
// statistics, mean and 1 / deviation; null where there is none.
template <class T>
struct Addresses {
  std::vector<const T*> parameters, statistics;
  T* gradient;  // the parameters' in their order, then [K, blocks * kTensors] of learned rates
};

// Runs all tasks on up to `threads` threads; the same bits for any number of them.
template <class T>
void run(const Kernel<T>&, const Network&, const Layout&, Call<T>, const Addresses<T>&, int threads);

// Numbers of a gradient.
int64_t gradient_size(const Network&);

}  // namespace fastmeta::conv
