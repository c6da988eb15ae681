// What the translation unit of an instruction set holds: its engines, for float and double.
#pragma once

#include "../maml.h"
#include "kernels.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class Engine>
void run_group(const Description& network, const Layout& layout,
               const Data<typename Engine::Scalar>& data, int64_t first, int64_t last,
               void* storage, typename Engine::Scalar* partial) {
  const auto run = [&](int64_t task, int slot) {
    Engine engine(storage, layout, task, data, partial);
    MetaStep<Engine>(engine, network, layout, data, slot).run();
  };
  if (!network.dual) {
    for (int64_t task = first; task < last; task += Engine::count) run(task, 0);
    return;
  }
  const int64_t together = Engine::takes_together ? network.together : Engine::count;
  for (int64_t task = first; task < last; task += together) {
    const int64_t left = last - task;
    const int tasks = Engine::takes_together ? int(left < together ? left : together) : 1;
    Engine engine(storage, layout, task, data, partial);
    TogetherDual<Engine> shared(engine, network, layout, data, tasks);
    for (int slot = 0; slot < tasks; ++slot) run(task + slot, slot);
    shared.finish();
  }
}

template <class Float, class Double>
cpu::Engine engine(const char* name) {
  return {name,
          {&run_group<Float>, Float::count, Float::width},
          {&run_group<Double>, Double::count, Double::width}};
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
