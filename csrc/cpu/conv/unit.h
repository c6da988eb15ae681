// What the translation unit of an instruction set holds.
#pragma once

#include "kernels.h"
#include "sweep.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T>
void run_task(const Network& network, const Layout& layout, const Call<T>& call, int64_t task,
              T* workspace, T* sums) {
  TaskStep<T>({network, layout, call, task, workspace, sums}).run();
}

template <class T>
fastmeta::conv::Kernel<T> kernel() {
  return {&run_task<T>, lanes<T>};
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
