// What the translation unit of an instruction set holds: its groups, for float and double.
#pragma once

#include "../maml.h"
#include "kernels.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class Engine>
void run_group(const Description& network, const Layout& layout,
               const Data<typename Engine::Scalar>& data, int64_t group, void* storage,
               typename Engine::Scalar* partial) {
  Engine engine(storage, group * Engine::count, data, partial);
  MetaStep<Engine>(engine, network, layout, data).run();
}

template <class Float, class Double>
cpu::InstructionSet instruction_set(const char* name) {
  return {name, {&run_group<Float>, Float::count}, {&run_group<Double>, Double::count}};
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
