// The kernels of each instruction set, by name; one translation unit each, with its own flags.
#pragma once

#include "../network.h"

namespace fastmeta::cpu {

// Runs the meta-step of one group of tasks in `storage`; its sums over tasks go to `partial`.
template <class T>
using Group = void (*)(const Description&, const Layout&, const Data<T>&, int64_t group,
                       void* storage, T* partial);

template <class T>
struct Kernel {
  Group<T> run;
  int tasks;  // in a group
};

struct InstructionSet {
  const char* name;
  Kernel<float> of_float;
  Kernel<double> of_double;
};

InstructionSet plain();
InstructionSet baseline();
#if defined(FASTMETA_X86)
InstructionSet avx2();
InstructionSet avx512();
#endif

}  // namespace fastmeta::cpu
