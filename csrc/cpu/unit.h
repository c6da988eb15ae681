// What the translation unit of an instruction set holds: its engines, for float and double.
#pragma once

#include "../maml.h"
#include "kernels.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class Engine>
void run_group(const Description& network, const Layout& layout,
               const Data<typename Engine::Scalar>& data, int64_t first, int64_t last,
               void* storage, typename Engine::Scalar* partial) {
  for (int64_t task = first; task < last; task += Engine::count) {
    Engine engine(storage, layout, task, data, partial);
    MetaStep<Engine>(engine, network, layout, data).run();
  }
}

template <class Float, class Double>
cpu::Engine engine(const char* name) {
  return {name,
          {&run_group<Float>, Float::count, Float::width},
          {&run_group<Double>, Double::count, Double::width}};
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
