// csrc/cuda/machine.h for a machine without a GPU: blocks run one after another, and a block's
// threads as fibres that give way at barriers and shuffles, in an order drawn anew each time.
//
// Shared memory begins as not-a-number, so that a thread that runs ahead of a missing barrier reads
// numbers that are wrong. Environment, looked at by each launch: FASTMETA_CUDA_SEED of the order,
// FASTMETA_CUDA_SKIP a barrier to leave out, FASTMETA_CUDA_FAIL (shared, launch) what to let fail,
// FASTMETA_CUDA_SHARED how many bytes of shared memory there are, FASTMETA_CUDA_MULTIPROCESSORS how
// many multiprocessors.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

// What the lanes of a warp gave each other, there until this lane gives again.
struct Given {
  int first, turn;
  const void* of(int lane) const;
};
// Waits for the warp's other lanes to give as much.
Given give(const void* numbers, std::size_t bytes);

void run(int64_t blocks, int threads, std::size_t bytes, void (*body)(const void*),
         const void* context);
void fail_if_asked(const char* what, const std::string& message);
int64_t shared_bytes();
int multiprocessors();

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
T from_lane_across(T number, int bit) {
  const on_host::Given given = on_host::give(&number, sizeof number);
  std::memcpy(&number, given.of(thread() % 32 ^ bit), sizeof number);
  return number;
}

struct Float4 {
  float of[4];
};
inline void check_begins_on_16_bytes(const float* numbers) {
  if (reinterpret_cast<uintptr_t>(numbers) % 16 == 0) return;
  throw std::logic_error("four numbers at once that don't begin on 16 bytes");
}
inline Float4 float4_at(const float* numbers, int place) {
  check_begins_on_16_bytes(numbers + place);
  Float4 x;
  std::memcpy(&x, numbers + place, sizeof x);
  return x;
}
inline void put_float4(float* numbers, int place, const Float4& x) {
  check_begins_on_16_bytes(numbers + place);
  std::memcpy(numbers + place, &x, sizeof x);
}

inline float rounded_to_tf32(float x) {
  if (std::isnan(x)) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  bits = (bits + 0x1000) & ~0x1fffu;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void add_tile_product(float (&sums)[4], const float (&left)[4], const float (&right)[2]) {
  struct Fragments {
    float left[2][2], right[2];  // left by half of the depth, then of the rows
  } mine;
  for (int i = 0; i < 4; ++i) mine.left[i / 2][i % 2] = rounded_to_tf32(left[i]);
  for (int i = 0; i < 2; ++i) mine.right[i] = rounded_to_tf32(right[i]);
  const on_host::Given given = on_host::give(&mine, sizeof mine);
  const auto of = [&](int lane) { return static_cast<const Fragments*>(given.of(lane)); };
  const int group = thread() % 32 / 4, member = thread() % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, col = 2 * member + i % 2;
    for (int k = 0; k < 8; ++k) {
      sums[i] += of(group * 4 + k % 4)->left[k / 4][lower] * of(col * 4 + k % 4)->right[k / 4];
    }
  }
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

inline int multiprocessors() { return on_host::multiprocessors(); }
inline int64_t most_shared_bytes() { return on_host::shared_bytes(); }

template <class Argument>
void allow_shared(Kernel<Argument>, std::size_t, bool) {
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
