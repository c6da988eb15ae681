// The inner loop: a step of it (1), and the way back (12).
#pragma once

#include "passes.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class InnerSteps : public Passes<E> {
 public:
  using typename StepViews<E>::S;
  using typename StepViews<E>::Num;

  FASTMETA_DEVICE explicit InnerSteps(const StepViews<E>& views) : Passes<E>(views) {}

 protected:
  using StepViews<E>::e, StepViews<E>::network, StepViews<E>::layout, StepViews<E>::data,
      StepViews<E>::depth, StepViews<E>::layer, StepViews<E>::dual, StepViews<E>::is_dual,
      StepViews<E>::theta, StepViews<E>::traces, StepViews<E>::input, StepViews<E>::parameters,
      StepViews<E>::rate;
  using Passes<E>::forward, Passes<E>::backward;

  FASTMETA_ONCE void inner_step(int k) {  // (1)
    const Trace* trace = traces(layout.support, k);
    forward(layout.support, trace, k);
    loss_forward(e, network.loss, layout.support, trace[depth - 1], layout.scalar);
    e.store(data.support_losses.at(k * data.tasks), layout.scalar);
    backward(layout.support, trace, k);
    if (network.elementwise_rates) load_rates(k);
    for (int l = network.body; l < depth; ++l) {
      descend(l, k, input(layout.support, trace, l), trace[l]);
    }
  }

  FASTMETA_ONCE void descend(int l, int k, View x, const Trace& t) {
    if (is_dual(l, kWeight) && network.layers[l].adapts[kWeight]) {
      dual().descend(k, rate(k, l, kWeight), t.product_delta);
    }
    move(l, k, x, t, theta(k + 1), theta(k), [](auto a) { return -a; });
  }

  // What adapts of a layer goes from one block to another, by factor(rate) along the gradient.
  template <class Factor>
  FASTMETA_DEVICE void move(int l, int k, View x, const Trace& t, int64_t to, int64_t from,
                            Factor factor) {
    const DenseLayer<E> at = layer(l);
    const S prox = S(network.prox);
    for (int i = 0; i < kTensors; ++i) {
      if (!network.layers[l].adapts[i] || is_dual(l, i)) continue;
      if (!network.elementwise_rates) {
        const S along = factor(rate(k, l, i));
        if (prox == 0) {
          gradient(i, AddTo<S>{along}, l, x, t, to, from);
        } else {
          gradient(i, Move<S>{S(1), along, prox}, l, x, t, to, from, theta(0));
        }
        continue;
      }
      gradient(i, Keep{}, l, x, t, layout.gradient);
      e.map([factor, prox](Num& out, Num g, Num p, Num anchor,
                           Num a) { out = p + factor(a) * (g + prox * (p - anchor)); },
            at.tensor(i, to), at.tensor(i, layout.gradient), at.tensor(i, from),
            at.tensor(i, theta(0)), at.tensor(i, layout.rate));
    }
  }

  // use(gradient of a tensor, out, in...), each in its block.
  template <class Use, class... Offsets>
  FASTMETA_ONCE void gradient(int tensor, Use use, int l, View x, const Trace& t, int64_t out,
                              Offsets... in) {
    if (tensor == kWeight) {
      layer(l).weight_gradient(use, t, x, out, in...);
    } else {
      layer(l).row_gradient(Tensor(tensor), use, t, out, in...);
    }
  }

  // (12), in place of theta_{k+1}. The gradient is made of the deltas that the inner step left, never
  // of weights that were rebuilt: their errors only add.
  FASTMETA_DEVICE void go_back(int k) {
    const Trace* trace = traces(layout.support, k);
    const S prox = S(network.prox);
    for (int l = network.body; l < depth; ++l) {
      move(l, k, input(layout.support, trace, l), trace[l], theta(k), theta(k + 1),
           [prox](auto a) { return a / (S(1) - prox * a); });
    }
  }

  FASTMETA_DEVICE void load_rates(int k) {
    const auto rates = data.elementwise_rates.at(k * layout.parameters);
    parameters(network.body, layout.rate,
               [&](View p, int64_t place) { e.load(p, rates.at(place)); });
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
