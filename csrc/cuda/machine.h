// What kernels and launches take from CUDA. The tests have a twin of it that runs them on the host.
#pragma once

#if defined(FASTMETA_CUDA_ON_HOST)
#include <machine_on_host.h>
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastmeta::cuda {

using Stream = cudaStream_t;

__device__ inline int thread() { return int(threadIdx.x); }
__device__ inline int threads() { return int(blockDim.x); }
__device__ inline int64_t block() { return blockIdx.x; }

// Waits for the block's other threads. `site` numbers the place in the source, so that a test can
// leave out one after another.
__device__ inline void barrier([[maybe_unused]] int site) { __syncthreads(); }

// The block's own memory.
template <class T>
__device__ T* shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// The number of the lane across: the one whose number differs in this bit.
template <class T>
__device__ T from_lane_across(T number, int bit) {
  return __shfl_xor_sync(0xffffffffu, number, bit);
}

// Four contiguous floats, read or written at once: they must begin on 16 bytes.
struct Float4 {
  float of[4];
};
__device__ inline Float4 float4_at(const float* values, int place) {
  const float4 x = *reinterpret_cast<const float4*>(values + place);
  return {{x.x, x.y, x.z, x.w}};
}
__device__ inline void put_float4(float* values, int place, const Float4& x) {
  *reinterpret_cast<float4*>(values + place) = make_float4(x.of[0], x.of[1], x.of[2], x.of[3]);
}

// To the nearest with ten bits behind the leading one; ties away from zero.
__device__ inline unsigned rounded_to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// A warp's 16 x 8 by 8 x 8 product, operands rounded to TF32, added to its 16 x 8 sums in float32. Of
// lane 4 g + t: left (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), right (t, g), (t + 4, g), and sums
// (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
__device__ inline void add_tile_product(float (&sums)[4], const float (&left)[4],
                                        const float (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rounded_to_tf32(left[0])), "r"(rounded_to_tf32(left[1])),
        "r"(rounded_to_tf32(left[2])), "r"(rounded_to_tf32(left[3])),
        "r"(rounded_to_tf32(right[0])), "r"(rounded_to_tf32(right[1])));
}

// The least e with 2^e >= n.
__device__ inline int log2_above(int n) { return n <= 1 ? 0 : 32 - __clz(n - 1); }

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class Argument>
using Kernel = void (*)(Argument);

// Makes it the current device. The runtime in this module is not torch's, and need not have heard of
// the choice made there.
inline void use_device(int device) { check(cudaSetDevice(device), "the device of the fused step"); }

// Throws where the current device can't run the kernel: no driver, one too old, no code for it.
template <class Argument>
void check_runs(Kernel<Argument> kernel) {
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel), "the fused step on this device");
}

// What a block on the current device may take of shared memory, in bytes.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of the device");
  return bytes;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "multiprocessors of the device");
  return count;
}

// And the rest of it as more blocks that fit a multiprocessor, or as more of its cache.
template <class Argument>
void allow_shared(Kernel<Argument> kernel, std::size_t bytes, bool more_cache) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "shared memory of the fused step");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             more_cache ? cudaSharedmemCarveoutMaxL1
                                        : cudaSharedmemCarveoutMaxShared),
        "shared memory of the fused step");
}

template <class Argument>
void launch(Kernel<Argument> kernel, int64_t blocks, int threads, std::size_t bytes, Stream stream,
            const Argument& argument) {
  kernel<<<dim3(unsigned(blocks)), threads, bytes, stream>>>(argument);
  check(cudaGetLastError(), "launch of the fused step");
}

}  // namespace fastmeta::cuda

#endif
