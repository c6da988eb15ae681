// csrc/cuda/machine.h for a machine without a GPU: blocks run one after another, and a block's
// threads as fibres that give way at barriers and shuffles, in an order drawn anew each time.
//
// Shared memory begins as not-a-number, so that a thread that runs ahead of a missing barrier reads
// numbers that are wrong. Environment, looked at by each launch: FASTMETA_CUDA_SEED of the order,
// FASTMETA_CUDA_SKIP a barrier to leave out, FASTMETA_CUDA_FAIL (shared, launch) what to let fail,
// FASTMETA_CUDA_SHARED how many bytes of shared memory there are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace fastmeta::cuda {

using Stream = void*;

namespace on_host {

// The thread that runs, and its block.
int thread();
int threads();
int64_t block();
void* shared();

void wait_for_block(int site);
// Gives `bytes` to the warp's other lanes, and takes those of the one `distance` further.
void exchange(void* number, std::size_t bytes, int distance);

void run(int64_t blocks, int threads, std::size_t bytes, void (*body)(const void*),
         const void* context);
void fail_if_asked(const char* what, const std::string& message);
int64_t shared_bytes();

}  // namespace on_host

inline int thread() { return on_host::thread(); }
inline int threads() { return on_host::threads(); }
inline int64_t block() { return on_host::block(); }
inline void barrier(int site) { on_host::wait_for_block(site); }

template <class T>
T* shared() {
  return static_cast<T*>(on_host::shared());
}

template <class T>
T from_lane_below(T number, int distance) {
  on_host::exchange(&number, sizeof number, distance);
  return number;
}

inline int log2_above(int n) {
  int e = 0;
  while (1 << e < n) ++e;
  return e;
}

template <class Argument>
using Kernel = void (*)(Argument);

inline void use_device(int) {}

template <class Argument>
void check_runs(Kernel<Argument>) {
  on_host::fail_if_asked("driver", "the fused step on this device: CUDA driver version is "
                                   "insufficient for CUDA runtime version");
}

inline int64_t most_shared_bytes() { return on_host::shared_bytes(); }

template <class Argument>
void allow_shared(Kernel<Argument>, std::size_t) {
  on_host::fail_if_asked("shared", "shared memory of the fused step: invalid argument");
}

template <class Argument>
void launch(Kernel<Argument> kernel, int64_t blocks, int threads, std::size_t bytes, Stream,
            const Argument& argument) {
  on_host::fail_if_asked("launch", "launch of the fused step: out of resources");
  const auto context = std::make_pair(kernel, &argument);
  on_host::run(
      blocks, threads, bytes,
      [](const void* given) {
        const auto& [kernel, argument] = *static_cast<const decltype(context)*>(given);
        kernel(*argument);
      },
      &context);
}

}  // namespace fastmeta::cuda
