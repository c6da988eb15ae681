// The Hessian's part of the reverse sweep (4), forward over reverse.
#pragma once

#include "inner_steps.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class HessianProducts : public InnerSteps<E> {
 public:
  using typename StepViews<E>::S;
  using typename StepViews<E>::Num;

  FASTMETA_DEVICE explicit HessianProducts(const StepViews<E>& views) : InnerSteps<E>(views) {}

 protected:
  using StepViews<E>::e, StepViews<E>::network, StepViews<E>::layout, StepViews<E>::depth,
      StepViews<E>::layer, StepViews<E>::dual, StepViews<E>::is_dual, StepViews<E>::blocks,
      StepViews<E>::vector, StepViews<E>::traces, StepViews<E>::input,
      StepViews<E>::body_cotangent, StepViews<E>::rate;

  // The vector a_k * lambda_{k+1}, zero where nothing adapts.
  FASTMETA_DEVICE void scale_by_rates(int k) {
    for (int l = network.body; l < depth; ++l) {
      const DenseLayer<E> at = layer(l);
      for (int i = 0; i < kTensors; ++i) {
        if (network.layers[l].has[i] && !is_dual(l, i)) {
          scale(l, k, i, at.tensor(i, vector(k)), at.tensor(i, layout.lambda),
                at.tensor(i, layout.rate));
        }
      }
    }
  }

  FASTMETA_ONCE void scale(int l, int k, int tensor, View vector, View lambda, View rates) {
    if (!network.layers[l].adapts[tensor]) {
      e.map([](Num& v) { v = Num{}; }, vector);
    } else if (network.elementwise_rates) {
      e.map([](Num& v, Num l, Num a) { v = a * l; }, vector, lambda, rates);
    } else {
      const S a = rate(k, l, tensor);
      e.map([a](Num& v, Num l) { v = a * l; }, vector, lambda);
    }
  }

  // lambda -= H_k v, forward over reverse, on what the inner step left.
  FASTMETA_ONCE void subtract_hessian_product(int k) {
    const Trace* trace = traces(layout.support, k);
    const View* rx = nullptr;
    int first_moved = depth;
    for (int l = network.body; l < depth; ++l) {
      const Tangent& r = layout.tangents[l];
      const Blocks at = blocks(l, k);
      bool moved = network.layers[l].adapts[kWeight];
      if (!is_dual(l, kWeight)) {
        moved = layer(l).tangent_product(input(layout.support, trace, l), rx, r, at, vector(k));
      } else if (moved) {
        dual().tangent_forward(rate(k, l, kWeight), r.value);
      }
      moved = layer(l).tangent_forward(moved, trace[l], r, at, vector(k));
      if (!moved) continue;
      if (first_moved == depth) first_moved = l;
      rx = &layout.tangents[l].value;
    }
    if (first_moved == depth) return;  // nothing adapts
    loss_tangent(e, network.loss, layout.support, trace[depth - 1],
                 layout.tangents[depth - 1].value, layout.tangents[depth - 1].delta);
    for (int l = depth - 1; l >= network.body; --l) {
      const Tangent& r = layout.tangents[l];
      layer(l).tangent_backward(trace[l], r, blocks(l, k), vector(k), l >= first_moved);
      if (is_dual(l, kWeight)) {
        dual().subtract_hessian(r.delta);
      } else {
        layer(l).subtract_hessian_of_weight(input(layout.support, trace, l),
                                            l > first_moved ? &layout.tangents[l - 1].value : nullptr,
                                            trace[l], r, layout.lambda);
      }
      layer(l).subtract_hessian_of_rows(r, layout.lambda);
      if (l > network.body) {
        layer(l).tangent_backward_input(Keep{}, trace[l], r, layout.tangents[l - 1].delta,
                                        blocks(l, k), vector(k));
      } else if (l > 0) {
        layer(l).tangent_backward_input(Add<S>{S(-1)}, trace[l], r, body_cotangent(layout.support),
                                        blocks(l, k), vector(k));
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
