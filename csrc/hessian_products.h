// The Hessian's part of the reverse sweep (4), forward over reverse.
#pragma once

#include "passes.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// That of a layer's output; null where it does not move.
template <class E>
FASTMETA_DEVICE const View* tangent_of(const Step<E>& s, int l) {
  return l >= 0 && s.network.layers[l].moves ? &s.layout.tangents[l].value : nullptr;
}

// The tangent of what step k predicts along the vector, in the last layer's `value`.
template <class E>
FASTMETA_ONCE void tangent_forward(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const auto& network = s.network;
  const auto& layout = s.layout;
  const int64_t v = s.vector(k);
  const Trace* trace = s.traces(layout.support, k);
  for (int l = network.body; l < s.depth; ++l) {
    const Dense& d = network.layers[l];
    if (!d.moves) continue;
    const Tangent& r = layout.tangents[l];
    const Blocks at = s.blocks(l, k);
    bool moved = d.adapts[kWeight];
    if (!s.is_dual(l, kWeight)) {
      const View x = s.input(layout.support, trace, l);
      moved = s.layer(l).tangent_product(x, tangent_of(s, d.from), trace[l], r, at, v);
    } else if (moved) {
      s.dual().tangent_forward(k, is_plain(network.rule) ? s.rate(k, l, kWeight) : S(1), r.value);
    }
    s.layer(l).tangent_forward(moved, trace[l], tangent_of(s, d.plus), r, at, v);
  }
}

// From the tangent of the derivative by the prediction, in the last layer's `delta`: block `out`
// gains `sign` times H_k v, and what lies before the layers that run at every step is
// `add_input(what is read, layer, whether it is added to the product)`'s.
template <class E, class AddInput>
FASTMETA_ONCE void tangent_backward(Step<E>& s, int k, typename E::Scalar sign, int64_t out,
                                    AddInput add_input) {
  const auto& network = s.network;
  const auto& layout = s.layout;
  const int64_t v = s.vector(k);
  using S = typename E::Scalar;
  const Add<S> add{sign};
  const Trace* trace = s.traces(layout.support, k);
  for (int l = s.depth - 1; l >= network.body; --l) {
    const Tangent& r = layout.tangents[l];
    const Blocks at = s.blocks(l, k);
    s.layer(l).tangent_backward(trace[l], r, at, v, network.layers[l].moves);
    if (s.is_dual(l, kWeight)) {
      s.dual().subtract_hessian(k, r.delta);
    } else if (network.layers[l].has[kWeight]) {
      s.layer(l).add_hessian_of_weight(add, s.input(layout.support, trace, l),
                                       tangent_of(s, network.layers[l].from), trace[l], r, out);
    }
    s.layer(l).add_hessian_of_rows(add, r, out);
    for_each_read<E>(network.layers[l], [&](int read, bool is_plus, bool adds) {
      if (read < network.body) return add_input(read, l, is_plus);
      const View to = layout.tangents[read].delta;
      adds ? s.layer(l).tangent_backward_input(Add<S>{1}, trace[l], r, to, at, v, is_plus)
           : s.layer(l).tangent_backward_input(Keep{}, trace[l], r, to, at, v, is_plus);
    });
  }
}

// lambda -= H_k v, forward over reverse, on what the inner step left.
template <class E>
FASTMETA_ONCE void subtract_hessian_product(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const auto& layout = s.layout;
  if (!s.network.layers[s.depth - 1].moves) return;  // nothing adapts
  tangent_forward(s, k);
  const Trace* trace = s.traces(layout.support, k);
  const Tangent& last = layout.tangents[s.depth - 1];
  loss_tangent(s.e, s.network.loss, layout.support, trace[s.depth - 1], last.value, last.delta);
  if constexpr (E::takes_programs) add_captured(s.e, layout.support, S(-1));
  const auto add_input = [&](int read, int l, bool is_plus) {
    if (read == kData && !s.network.inputs_flow) return;
    const View out = read == kData ? layout.support.of_inputs : s.body_cotangent(layout.support);
    s.layer(l).tangent_backward_input(Add<S>{S(-1)}, trace[l], layout.tangents[l], out,
                                      s.blocks(l, k), s.vector(k), is_plus);
  };
  tangent_backward(s, k, S(-1), layout.lambda, add_input);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
