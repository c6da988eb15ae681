// The meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
//
// Knows layers, their rules and an engine's operations on matrices; nothing about hardware.
#pragma once

#include "hessian_products.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class MetaStep : public HessianProducts<E> {
 public:
  using typename StepViews<E>::S;
  using typename StepViews<E>::Num;
  using typename StepViews<E>::Examples;

  FASTMETA_DEVICE explicit MetaStep(const StepViews<E>& views) : HessianProducts<E>(views) {}

  FASTMETA_DEVICE void run() {
    load();
    if (network.steps > 0) forward_body(layout.support);
    if (network.query > 0) forward_body(layout.query);
    if (network.differentiate) start_cotangent();
    for (int k = 0; k < network.steps; ++k) {
      if (!sweeps(network)) add_query(k);
      inner_step(k);
    }
    add_query(network.steps);  // (2)
    if (!network.differentiate) {
      if (!data.adapted.empty()) store_adapted();
      return;
    }
    for (int k = network.steps - 1; sweeps(network) && k >= 0; --k) {
      through_step(k);  // (3), (4)
      add_query(k);
    }
    if (network.prox != 0 && !network.first_order) {  // (5)
      e.map([](Num& l, Num a) { l = l + a; }, head(layout.lambda), head(layout.anchor));
    }
    backward_body(layout.query);
    if (network.steps > 0 && !network.first_order) backward_body(layout.support);
    if (network.dual) dual().finish();
    sum_tasks(0, 0, layout.lambda);
  }

 private:
  using StepViews<E>::e, StepViews<E>::network, StepViews<E>::layout, StepViews<E>::data,
      StepViews<E>::depth, StepViews<E>::loaded, StepViews<E>::support_x, StepViews<E>::query_x,
      StepViews<E>::head, StepViews<E>::clear, StepViews<E>::layer, StepViews<E>::dual,
      StepViews<E>::is_dual, StepViews<E>::blocks, StepViews<E>::theta, StepViews<E>::vector,
      StepViews<E>::traces, StepViews<E>::input, StepViews<E>::body_cotangent,
      StepViews<E>::parameters, StepViews<E>::rate;
  using Passes<E>::forward_body, Passes<E>::backward_body, Passes<E>::add_query;
  using InnerSteps<E>::inner_step, InnerSteps<E>::load_rates, InnerSteps<E>::go_back,
      InnerSteps<E>::gradient;
  using HessianProducts<E>::scale_by_rates, HessianProducts<E>::subtract_hessian_product;

  FASTMETA_DEVICE void sum_tasks(int from, int64_t start, int64_t block) {
    parameters(from, block,
               [&](View p, int64_t place) { e.sum_tasks(start + place, p, e.weight()); });
  }

  FASTMETA_DEVICE void load() {
    if (!loaded) load_parameters();
    support_x = e.inputs(layout.support.inputs, data.support_x);
    load(layout.support, data.support_y, data.support_labels,
         data.support_weights, data.support_loss_weights);
    if (network.query > 0) {
      query_x = e.inputs(layout.query.inputs, data.query_x);
      load(layout.query, data.query_y, data.query_labels, data.query_weights,
           data.query_loss_weights);
    }
    if (!network.dual) return;
    if constexpr (E::takes_products) {
      e.load_products(layout.dual, network.layers.front().adapts[kWeight]);
    } else {
      dual().find_grams(support_x, query_x);
    }
  }

  FASTMETA_DEVICE void load_parameters() {
    e.map([](Num& one, Num& zero) { one = Num{} + S(1), zero = Num{}; }, layout.one, layout.zero);
    for (int l = 0; l < depth; ++l) {
      const Dense& d = network.layers[l];
      for (int i = 0; i < kTensors; ++i) {
        if (!d.has[i] || is_dual(l, i)) continue;
        e.load(layer(l).tensor(i, theta(0)), data.parameters[l * kTensors + i]);
      }
      if (d.norm == Norm::running) {
        e.load(layout.layers[l].mean, data.statistics[2 * l]);
        e.load(layout.layers[l].inverse, data.statistics[2 * l + 1]);
      }
    }
  }

  FASTMETA_ONCE void load(const Examples& set, Global<const S> y, Global<const int64_t> labels,
                            Global<const S> weights, Global<const S> loss_weights) {
    if (weights.given()) {
      e.load(set.weights, weights);
    } else {
      const S each = S(1) / S(set.weights.rows);
      e.map([each](Num& w) { w = Num{} + each; }, set.weights);
    }
    load_targets(e, network.loss, set, y, labels, loss_weights);
  }

  FASTMETA_DEVICE void start_cotangent() {
    clear({layout.lambda, 1, int(layout.block), int(layout.block), 1});
    if (network.prox != 0) clear(head(layout.anchor));
    if (network.dual) dual().start_cotangent();
    if (network.body > 0) {
      clear(body_cotangent(layout.query));
      clear(body_cotangent(layout.support));
    }
  }

  FASTMETA_DEVICE void store_adapted() {
    for (int l = 0; l < depth; ++l) {
      for (int i = 0; i < kTensors; ++i) {
        if (!network.layers[l].adapts[i]) continue;
        e.store(data.adapted[l * kTensors + i], layer(l).tensor(i, theta(network.steps)));
      }
    }
  }

  FASTMETA_ONCE void through_step(int k) {
    if (network.elementwise_rates) load_rates(k);
    if (network.reversible && k > 0) go_back(k);  // theta_0 is there, and exact
    const bool along = network.learned_rates || !network.first_order;
    if (network.dual && network.layers[0].adapts[kWeight] && along) dual().find_along();
    if (network.learned_rates) add_rate_gradients(k);
    if (network.first_order) return;
    scale_by_rates(k);
    if (network.prox != 0) {
      const S prox = S(network.prox);
      e.map([prox](Num& l, Num& anchor, Num v) { l = l - prox * v, anchor = anchor + prox * v; },
            head(layout.lambda), head(layout.anchor), head(vector(k)));
    }
    subtract_hessian_product(k);
  }

  FASTMETA_ONCE void add_rate_gradients(int k) {  // (3)
    const Trace* trace = traces(layout.support, k);
    const Move<S> keep{S(0), S(1), S(network.prox)};
    const int64_t start = layout.parameters;
    for (int l = network.body; l < depth; ++l) {
      const Dense& d = network.layers[l];
      DenseLayer<E> at = layer(l);
      const Blocks here = blocks(l, k);
      for (int i = 0; i < kTensors; ++i) {
        if (!d.has[i] || is_dual(l, i)) continue;
        gradient(i, keep, l, input(layout.support, trace, l), trace[l], layout.gradient, here.of[i],
                 theta(0));
      }
      for (int i = 0; i < kTensors && !network.elementwise_rates; ++i) {
        const int64_t place = start + (k * depth + l) * kTensors + i;
        if (is_dual(l, i)) {
          if (!d.adapts[i]) continue;
          dual().rate_gradient(layout.scalar, trace[l].product_delta);
          add_scalar(place);
        } else if (d.has[i]) {
          e.dot(layout.scalar, at.tensor(i, layout.gradient), at.tensor(i, layout.lambda));
          add_scalar(place);
        }
      }
    }
    if (network.elementwise_rates) {
      e.map([](Num& g, Num l) { g = -g * l; }, head(layout.gradient), head(layout.lambda));
      sum_tasks(network.body, start + k * layout.parameters, layout.gradient);
    }
  }

  FASTMETA_DEVICE void add_scalar(int64_t place) {
    e.map([](Num& d) { d = -d; }, layout.scalar);
    e.sum_tasks(place, layout.scalar, e.weight());
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
