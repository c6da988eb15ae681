// The convolutional step of each instruction set; one translation unit each, with its own flags.
#pragma once

#include "layout.h"

namespace fastmeta::conv {

// Runs the meta-step of a task in `workspace`, adding its sums to `sums`.
template <class T>
using RunTask = void (*)(const Network&, const Layout&, const Call<T>&, int64_t task, T* workspace,
                     T* sums);

template <class T>
struct Kernel {
  RunTask<T> run;
  int lanes;
};

struct Kernels {
  Kernel<float> of_float;
  Kernel<double> of_double;
};

Kernels plain();
Kernels baseline();
#if defined(FASTMETA_X86)
Kernels avx2();
Kernels avx512();
#endif

}  // namespace fastmeta::conv
