// The Hessian's part of the reverse sweep (4), forward over reverse.
#pragma once

#include "passes.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// The first layer whose output moves with what adapts; the depth where none does.
template <class E>
FASTMETA_DEVICE int first_moved(const Step<E>& s) {
  for (int l = s.network.body; l < s.depth; ++l) {
    for (const bool each : s.network.layers[l].adapts) {
      if (each) return l;
    }
  }
  return s.depth;
}

// The tangent of what step k predicts along the vector, in the last layer's `value`.
template <class E>
FASTMETA_ONCE void tangent_forward(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const auto& network = s.network;
  const auto& layout = s.layout;
  const int64_t v = s.vector(k);
  const Trace* trace = s.traces(layout.support, k);
  const View* rx = nullptr;
  for (int l = first_moved(s); l < s.depth; ++l) {
    const Tangent& r = layout.tangents[l];
    const Blocks at = s.blocks(l, k);
    bool moved = network.layers[l].adapts[kWeight];
    if (!s.is_dual(l, kWeight)) {
      moved = s.layer(l).tangent_product(s.input(layout.support, trace, l), rx, r, at, v);
    } else if (moved) {
      s.dual().tangent_forward(k, is_plain(network.rule) ? s.rate(k, l, kWeight) : S(1), r.value);
    }
    s.layer(l).tangent_forward(moved, trace[l], r, at, v);
    rx = &layout.tangents[l].value;
  }
}

// From the tangent of the derivative by the prediction, in the last layer's `delta`: block `out`
// gains `sign` times H_k v, and what lies before the layers that run at every step is
// `add_input(layer, its trace, its tangent, its blocks)`'s.
template <class E, class AddInput>
FASTMETA_ONCE void tangent_backward(Step<E>& s, int k, typename E::Scalar sign, int64_t out,
                                    AddInput add_input) {
  const auto& network = s.network;
  const auto& layout = s.layout;
  const int64_t v = s.vector(k);
  const Add<typename E::Scalar> add{sign};
  const Trace* trace = s.traces(layout.support, k);
  const int first = first_moved(s);
  for (int l = s.depth - 1; l >= network.body; --l) {
    const Tangent& r = layout.tangents[l];
    const Blocks at = s.blocks(l, k);
    s.layer(l).tangent_backward(trace[l], r, at, v, l >= first);
    if (s.is_dual(l, kWeight)) {
      s.dual().subtract_hessian(k, r.delta);
    } else {
      s.layer(l).add_hessian_of_weight(add, s.input(layout.support, trace, l),
                                       l > first ? &layout.tangents[l - 1].value : nullptr,
                                       trace[l], r, out);
    }
    s.layer(l).add_hessian_of_rows(add, r, out);
    if (l > network.body) {
      s.layer(l).tangent_backward_input(Keep{}, trace[l], r, layout.tangents[l - 1].delta, at, v);
    } else {
      add_input(l, trace[l], r, at);
    }
  }
}

// lambda -= H_k v, forward over reverse, on what the inner step left.
template <class E>
FASTMETA_ONCE void subtract_hessian_product(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const auto& layout = s.layout;
  if (first_moved(s) == s.depth) return;  // nothing adapts
  tangent_forward(s, k);
  const Tangent& last = layout.tangents[s.depth - 1];
  loss_tangent(s.e, s.network.loss, layout.support, s.traces(layout.support, k)[s.depth - 1],
               last.value, last.delta);
  if constexpr (E::takes_programs) add_captured(s.e, layout.support, S(-1));
  const auto add_input = [&](int l, const Trace& t, const Tangent& r, const Blocks& at) {
    if (l == 0) return;  // before it are the inputs
    s.layer(l).tangent_backward_input(Add<S>{S(-1)}, t, r, s.body_cotangent(layout.support), at,
                                      s.vector(k));
  };
  tangent_backward(s, k, S(-1), layout.lambda, add_input);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
