// The kernels of each instruction set, by name; one translation unit each, with its own flags.
#pragma once

#include "../network.h"
#include "../open_call.h"

namespace fastmeta::cpu {

// Runs the meta-step of tasks `first` to `last` - 1 in `storage`, in their order; adds their sums
// to `sums`, which begin at a whole vector. `loaded`: it did so for others of this call in the same
// storage.
template <class T>
using Group = void (*)(const Description&, const Layout&, const Data<T>&, int64_t first,
                       int64_t last, bool loaded, void* storage, T* sums);

// The meta-gradient from the sums, in which weights lie as they do in storage.
template <class T>
using Unpack = void (*)(const Description&, const Layout&, const T* sums, T* gradient);

// Makes one pass of those tasks in the storage of them all, of which each vector of tasks takes
// `stride` bytes.
template <class T>
using OpenGroup = void (*)(const Description&, const Layout&, const Data<T>&, const OpenCall<T>&,
                           int64_t first, int64_t last, char* storage, int64_t stride, T* sums);

template <class T>
struct Kernel {
  Group<T> run;
  OpenGroup<T> open;
  Unpack<T> unpack;
  int tasks;  // side by side
  int width;  // columns side by side
};

struct Engine {
  const char* name;
  Kernel<float> of_float;
  Kernel<double> of_double;
};

struct InstructionSet {
  const char* name;
  Engine tasks, features;  // what the lanes of a vector are
};

InstructionSet plain();
InstructionSet baseline();
#if defined(FASTMETA_X86)
InstructionSet avx2();
InstructionSet avx512();
#endif

}  // namespace fastmeta::cpu
