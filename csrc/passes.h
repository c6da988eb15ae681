// What a set of examples goes through at some theta: forward, backward, and into lambda.
#pragma once

#include "epilogues.h"
#include "losses.h"
#include "step_views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class Passes : public StepViews<E> {
 public:
  using typename StepViews<E>::S;
  using typename StepViews<E>::Examples;

  FASTMETA_DEVICE explicit Passes(const StepViews<E>& views) : StepViews<E>(views) {}

 protected:
  using StepViews<E>::e, StepViews<E>::network, StepViews<E>::layout, StepViews<E>::data,
      StepViews<E>::depth, StepViews<E>::layer, StepViews<E>::dual, StepViews<E>::is_dual,
      StepViews<E>::is_query, StepViews<E>::blocks, StepViews<E>::traces, StepViews<E>::input,
      StepViews<E>::body_cotangent;

  FASTMETA_DEVICE void forward_body(const Examples& set) {
    forward(set, traces(set, 0), 0, 0, network.body);
  }

  FASTMETA_DEVICE void forward(const Examples& set, const Trace* trace, int k) {
    forward(set, trace, k, network.body, depth);
  }

  FASTMETA_ONCE void forward(const Examples& set, const Trace* trace, int k, int from, int to) {
    for (int l = from; l < to; ++l) {
      const Blocks at = blocks(l, k);
      if (is_dual(l, kWeight)) {
        const View bias = layer(l).row(kBias, at.of[kBias]);
        dual().forward(is_query(set), k, trace[l].product, network.layers[l].has[kBias] ? &bias : nullptr);
        layer(l).after_product(trace[l], at);
      } else {
        layer(l).forward(input(set, trace, l), trace[l], at);
      }
    }
  }

  // From the loss down to the body, leaving every layer's delta at its product.
  FASTMETA_DEVICE void backward(const Examples& set, const Trace* trace, int k) {
    loss_backward(e, network.loss, set, trace[depth - 1]);
    backward(trace, k, network.body, depth);
  }

  FASTMETA_ONCE void backward(const Trace* trace, int k, int from, int to) {
    for (int l = to - 1; l >= from; --l) {
      layer(l).backward(trace[l], blocks(l, k));
      if (l > from) layer(l).backward_input(Keep{}, trace[l], trace[l - 1].delta, blocks(l, k));
    }
  }

  // lambda += the body's gradient, of what the steps have summed after it.
  FASTMETA_DEVICE void backward_body(const Examples& set) {
    const Trace* trace = traces(set, 0);
    backward(trace, 0, 0, network.body);
    for (int l = 0; l < network.body; ++l) add_gradient(S(1), set, trace, l);
  }

  // lambda += w times the gradient of a layer.
  FASTMETA_ONCE void add_gradient(S w, const Examples& set, const Trace* trace, int l) {
    const Add<S> add{w};
    if (!is_dual(l, kWeight)) {
      layer(l).weight_gradient(add, trace[l], input(set, trace, l), layout.lambda);
    } else if (is_query(set)) {
      dual().add_query(w, trace[l].product_delta);
    } else {
      dual().add_support(trace[l].product_delta);
    }
    for (int row = kBias; row < kTensors; ++row) {
      if (network.layers[l].has[row]) layer(l).row_gradient(row, add, trace[l], layout.lambda);
    }
  }

  FASTMETA_DEVICE void query_forward(int k) {
    const Trace* trace = traces(layout.query, k);
    forward(layout.query, trace, k);
    if (k == network.steps) e.store(data.query_outputs, trace[depth - 1].value);
    loss_forward(e, network.loss, layout.query, trace[depth - 1], layout.scalar);
    e.store(data.step_losses.at(k * data.tasks), layout.scalar);
  }

  // lambda += w_k grad L_q(theta_k)
  FASTMETA_ONCE void add_query(int k) {
    if (!data.evaluates[k]) return;
    query_forward(k);
    const S w = data.step_weights[k];
    if (!network.differentiate || w == S(0)) return;
    const Trace* trace = traces(layout.query, k);
    backward(layout.query, trace, k);
    for (int l = network.body; l < depth; ++l) add_gradient(w, layout.query, trace, l);
    if (network.body == 0) return;
    layer(network.body).backward_input(Add<S>{w}, trace[network.body],
                                       body_cotangent(layout.query), blocks(network.body, k));
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
