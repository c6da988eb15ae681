// What the translation unit of an instruction set holds: its engines, for float and double.
#pragma once

#include "../maml.h"
#include "../open_passes.h"
#include "kernels.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class Engine>
void run_group(const Description& network, const Layout& layout,
               const Data<typename Engine::Scalar>& data, int64_t first, int64_t last,
               bool loaded, void* storage, typename Engine::Scalar* sums) {
  const auto run = [&](int64_t task, int slot) {
    Engine engine(storage, layout, task, data, sums);
    Step<Engine> step{engine, network, layout, data, slot, loaded || task > first};
    if (network.chunk > 0) step.at_hand.parts = layout.parts.data();
    run_step(step);
  };
  if (!network.dual) {
    for (int64_t task = first; task < last; task += Engine::count) run(task, 0);
    return;
  }
  const int64_t together = Engine::takes_together ? network.together : Engine::count;
  for (int64_t task = first; task < last; task += together) {
    const int64_t left = last - task;
    const int tasks = Engine::takes_together ? int(left < together ? left : together) : 1;
    Engine engine(storage, layout, task, data, sums);
    TogetherDual<Engine> shared(engine, network, layout, data, tasks, loaded || task > first);
    for (int slot = 0; slot < tasks; ++slot) run(task + slot, slot);
    shared.finish();
  }
}

template <class Engine>
void run_open(const Description& network, const Layout& layout,
              const Data<typename Engine::Scalar>& data,
              const OpenCall<typename Engine::Scalar>& call, int64_t first, int64_t last,
              char* storage, int64_t stride, typename Engine::Scalar* sums) {
  for (int64_t task = first; task < last; task += Engine::count) {
    Engine engine(storage + task / Engine::count * stride, layout, task, data, sums);
    Step<Engine> step{engine, network, layout, data, 0, true};
    OpenStep<Engine>(step, call).run();
  }
}

template <class Engine>
void unpack(const Description& network, const Layout& layout,
            const typename Engine::Scalar* sums, typename Engine::Scalar* gradient) {
  const int64_t size = gradient_size(network, layout);
  int64_t at = 0;
  // A weight's sums, and those of its elements' rates at each step.
  const bool of_rates = network.learned_rates && network.elementwise_rates;
  const int blocks = Engine::width > 1 ? 1 + (of_rates ? network.steps : 0) : 0;
  for (int block = 0; block < blocks; ++block) {
    for (const Dense& layer : network.layers) {
      if (layer.has[kWeight]) {
        if constexpr (Engine::width > 1) {
          Engine::unpack(gradient + at, sums + at, layer.out, layer.in);
        }
        at += int64_t(layer.in) * layer.out;
      }
      for (Tensor row : kRows) {
        if (!layer.has[row]) continue;
        __builtin_memcpy(gradient + at, sums + at, layer.out * sizeof *sums);
        at += layer.out;
      }
    }
  }
  __builtin_memcpy(gradient + at, sums + at, (size - at) * sizeof *sums);
}

template <class Float, class Double>
cpu::Engine engine(const char* name) {
  return {name,
          {&run_group<Float>, &run_open<Float>, &unpack<Float>, Float::count, Float::width},
          {&run_group<Double>, &run_open<Double>, &unpack<Double>, Double::count, Double::width}};
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
