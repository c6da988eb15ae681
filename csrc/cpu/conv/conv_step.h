// The convolutional meta-step on this processor: tasks spread over threads.
#pragma once

#include <string>

#include "kernels.h"
#include "packing.h"

namespace fastmeta::conv {

// Of an instruction set of cpu::instruction_set, by its name.
Kernels kernels(const std::string& instruction_set);

// What a task may take on one core, roughly, with vectors of so many lanes.
double seconds(const Network&, const Layout&, int lanes);

// Runs all tasks on up to `threads` threads; the same bits for any number of them. Adapted
// parameters are asked for without derivatives: those of the last step are what is kept then.
template <class T>
void run(const Kernel<T>&, const Network&, const Layout&, Call<T>, const Addresses<T>&,
         int threads);

}  // namespace fastmeta::conv
