// The fused meta-step on a GPU: launches.
#pragma once

#include <cstdint>

#include "call.h"

namespace fastmeta::cuda {

struct Shape {
  int64_t blocks;
  int threads;  // of a block, a power of two from 32 to kMostThreads
  int64_t shared_bytes;
  int64_t workspace;  // elements of `Call::workspace`; 0 where tasks lie in shared memory
};

// Of a device.
struct Limits {
  int64_t shared_bytes;  // what a block may take of shared memory
  int multiprocessors;
};

// Throws std::runtime_error, which says why, where the device can't run the kernels.
Limits limits(int device);

// Both kernels of a step: the tasks, then the sum over them into `gradient`. Throws
// std::runtime_error where one can't be launched.
template <class T>
void run(const Call<T>&, const Shape&, T* gradient, int device, void* stream);

}  // namespace fastmeta::cuda
