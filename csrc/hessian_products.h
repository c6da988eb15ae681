// The Hessian's part of the reverse sweep (4), forward over reverse.
#pragma once

#include "passes.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// lambda -= H_k v, forward over reverse, on what the inner step left.
template <class E>
FASTMETA_ONCE void subtract_hessian_product(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const auto& network = s.network;
  const auto& layout = s.layout;
  const int64_t v = s.vector(k);
  const Trace* trace = s.traces(layout.support, k);
  const View* rx = nullptr;
  int first_moved = s.depth;
  for (int l = network.body; l < s.depth; ++l) {
    const Tangent& r = layout.tangents[l];
    const Blocks at = s.blocks(l, k);
    bool moved = network.layers[l].adapts[kWeight];
    if (!s.is_dual(l, kWeight)) {
      moved = s.layer(l).tangent_product(s.input(layout.support, trace, l), rx, r, at, v);
    } else if (moved) {
      s.dual().tangent_forward(is_plain(network.rule) ? s.rate(k, l, kWeight) : S(1), r.value);
    }
    moved = s.layer(l).tangent_forward(moved, trace[l], r, at, v);
    if (!moved) continue;
    if (first_moved == s.depth) first_moved = l;
    rx = &layout.tangents[l].value;
  }
  if (first_moved == s.depth) return;  // nothing adapts
  loss_tangent(s.e, network.loss, layout.support, trace[s.depth - 1],
               layout.tangents[s.depth - 1].value, layout.tangents[s.depth - 1].delta);
  for (int l = s.depth - 1; l >= network.body; --l) {
    const Tangent& r = layout.tangents[l];
    const Blocks at = s.blocks(l, k);
    s.layer(l).tangent_backward(trace[l], r, at, v, l >= first_moved);
    if (s.is_dual(l, kWeight)) {
      s.dual().subtract_hessian(r.delta);
    } else {
      s.layer(l).subtract_hessian_of_weight(s.input(layout.support, trace, l),
                                            l > first_moved ? &layout.tangents[l - 1].value : nullptr,
                                            trace[l], r, layout.lambda);
    }
    s.layer(l).subtract_hessian_of_rows(r, layout.lambda);
    if (l > network.body) {
      s.layer(l).tangent_backward_input(Keep{}, trace[l], r, layout.tangents[l - 1].delta, at, v);
    } else if (l > 0) {
      s.layer(l).tangent_backward_input(Add<S>{S(-1)}, trace[l], r,
                                        s.body_cotangent(layout.support), at, v);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
