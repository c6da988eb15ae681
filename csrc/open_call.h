// One pass through layers for all tasks, whose cotangents come from the caller.
#pragma once

#include <vector>

#include "network.h"

namespace fastmeta {

// Those of a slot in this order: each builds on what the ones before it left in the tasks' storage.
enum class OpenPass { forward, backward, tangent, tangent_backward };

// Addresses of a pass; what a pass does not read or write is null.
template <class Scalar>
struct OpenCall {
  OpenPass pass;
  int slot;                      // K of support sets, then that of the query set
  Global<const Scalar> flowing;  // the derivative by the outputs, or its tangent [T, N, C]
  Global<Scalar> output;         // the outputs, or their tangent [T, N, C]
  Global<Scalar> of_input;       // the derivative by the inputs, or its tangent [T, N, D]
  std::vector<Global<const Scalar>> vectors;  // the tangents of what adapts [T, ...]
  // Of each tensor, null where it is not asked for: [T, ...], or with a stride of 0 summed.
  std::vector<Global<Scalar>> gradients;
  Scalar* summed;  // [P]
};

// `slots` support sets at a time, and a query set. Updates and losses are made between the passes.
inline void open(Description& network, int slots, bool first_order, bool inputs_flow) {
  network.open = true;
  network.inputs_flow = inputs_flow;
  network.steps = slots;
  network.differentiate = true;
  network.first_order = first_order;
  network.body = 0;
}

}  // namespace fastmeta
