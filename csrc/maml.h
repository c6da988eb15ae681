// The meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
//
// Knows layers, their rules and an engine's operations on matrices; nothing about hardware.
#pragma once

#include "dense.h"
#include "losses.h"
#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class MetaStep {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  MetaStep(E& engine, const Description& network, const Layout& layout, const Data<S>& data)
      : e(engine), network(network), layout(layout), data(data), depth(int(network.layers.size())) {}

  void run() {
    load();
    for (int k = 0; k < network.steps; ++k) {
      if (!network.differentiate && data.evaluates[k]) query_forward(k);
      inner_step(k);
    }
    if (!network.differentiate) {
      if (data.evaluates[network.steps]) query_forward(network.steps);
      if (!data.adapted.empty()) store_adapted();
      return;
    }
    e.map([](Num& l) { l = Num{}; }, block(layout.lambda));
    if (network.prox != 0) e.map([](Num& l) { l = Num{}; }, block(layout.anchor));
    add_query(network.steps);  // (2)
    for (int k = network.steps - 1; k >= 0; --k) {
      through_step(k);  // (3), (4)
      add_query(k);
    }
    if (network.prox != 0 && !network.first_order) {  // (5)
      e.map([](Num& l, Num a) { l = l + a; }, block(layout.lambda), block(layout.anchor));
    }
    sum_tasks(0, layout.lambda);
  }

 private:
  E& e;
  const Description& network;
  const Layout& layout;
  const Data<S>& data;
  const int depth;

  View block(int64_t offset) const {
    return {offset, 1, int(layout.block), int(layout.block), 1};
  }
  DenseLayer<E> layer(int l) { return {e, network.layers[l], layout.layers[l]}; }

  // The block of theta_k. Without a reverse sweep two take turns beside theta_0.
  int64_t theta(int k) const {
    const int slot = network.differentiate || k == 0 ? k : 1 + k % 2;
    return layout.theta + slot * layout.block;
  }
  // The block where a parameter of theta_k is found: one that does not adapt stays in theta_0.
  int64_t weight_of(int l, int k) const {
    return theta(network.layers[l].adapts_weight ? k : 0);
  }
  int64_t bias_of(int l, int k) const { return theta(network.layers[l].adapts_bias ? k : 0); }

  const Trace* traces(const Examples& set, int k) const {
    const bool kept = &set == &layout.support && layout.traces_kept > 1;
    return &set.traces[kept ? k * depth : 0];
  }
  View input(const Examples& set, const Trace* trace, int l) const {
    return l == 0 ? set.inputs : trace[l - 1].value;
  }
  // use(parameter of a block, its place among the P numbers of all)
  template <class Use>
  void parameters(int64_t block, Use use) {
    int64_t place = 0;
    for (int l = 0; l < depth; ++l) {
      const Dense& d = network.layers[l];
      use(layer(l).weight(block), place);
      place += int64_t(d.in) * d.out;
      if (!d.bias) continue;
      use(layer(l).bias(block), place);
      place += d.out;
    }
  }
  void sum_tasks(int64_t start, int64_t block) {
    parameters(block, [&](View p, int64_t place) { e.sum_tasks(start + place, p); });
  }
  void load_rates(int k) {
    const auto rates = data.elementwise_rates.at(k * layout.parameters);
    parameters(layout.rate, [&](View p, int64_t place) { e.load(p, rates.at(place)); });
  }
  S rate(int k, int tensor) const { return data.rates[k * 2 * depth + tensor]; }

  void load() {
    for (int l = 0; l < depth; ++l) {
      e.load(layer(l).weight(theta(0)), data.parameters[2 * l]);
      if (network.layers[l].bias) e.load(layer(l).bias(theta(0)), data.parameters[2 * l + 1]);
    }
    load(layout.support, data.support_x, data.support_y, data.support_labels,
         data.support_weights);
    if (network.query > 0) {
      load(layout.query, data.query_x, data.query_y, data.query_labels, data.query_weights);
    }
  }

  void load(const Examples& set, Global<const S> x, Global<const S> y,
            Global<const int64_t> labels, Global<const S> weights) {
    e.load(set.inputs, x);
    if (weights.given()) {
      e.load(set.weights, weights);
    } else {
      const S each = S(1) / S(set.weights.rows);
      e.map([each](Num& w) { w = Num{} + each; }, set.weights);
    }
    if (labels.given()) {
      e.load_labels(set.targets, set.weights, labels, network.loss.ignore_index,
                    S(network.loss.option));
    } else {
      e.load(set.targets, y);
    }
  }

  void store_adapted() {
    for (int l = 0; l < depth; ++l) {
      const Dense& d = network.layers[l];
      if (d.adapts_weight) {
        e.store(data.adapted[2 * l], layer(l).weight(theta(network.steps)));
      }
      if (d.adapts_bias) {
        e.store(data.adapted[2 * l + 1], layer(l).bias(theta(network.steps)));
      }
    }
  }

  void forward(const Examples& set, const Trace* trace, int k) {
    for (int l = 0; l < depth; ++l) {
      layer(l).forward(input(set, trace, l), trace[l], weight_of(l, k), bias_of(l, k));
    }
  }

  // From the loss down to the first layer, leaving every layer's delta before its activation.
  void backward(const Examples& set, const Trace* trace, int k) {
    loss_backward(e, network.loss, set, trace[depth - 1]);
    for (int l = depth - 1; l >= 0; --l) {
      layer(l).backward(trace[l]);
      if (l > 0) layer(l).backward_input(trace[l], trace[l - 1].delta, weight_of(l, k));
    }
  }

  void inner_step(int k) {  // (1)
    const Trace* trace = traces(layout.support, k);
    forward(layout.support, trace, k);
    loss_forward(e, network.loss, layout.support, trace[depth - 1], layout.scalar);
    e.store(data.support_losses.at(k * data.tasks), layout.scalar);
    backward(layout.support, trace, k);
    if (network.elementwise_rates) load_rates(k);
    for (int l = 0; l < depth; ++l) descend(l, k, input(layout.support, trace, l), trace[l]);
  }

  void descend(int l, int k, View x, const Trace& t) {
    const Dense& d = network.layers[l];
    const S prox = S(network.prox);
    if (network.elementwise_rates) {
      const auto move = [prox](Num g, Num& next, Num p, Num anchor, Num a) {
        next = p - a * (g + prox * (p - anchor));
      };
      if (d.adapts_weight) {
        layer(l).weight_gradient(move, t, x, theta(k + 1), theta(k), theta(0), layout.rate);
      }
      if (d.adapts_bias) {
        layer(l).bias_gradient(move, t, theta(k + 1), theta(k), theta(0), layout.rate);
      }
      return;
    }
    const auto move = [](S a, S prox) {
      return [a, prox](Num g, Num& next, Num p, Num anchor) {
        next = p - a * (g + prox * (p - anchor));
      };
    };
    if (d.adapts_weight) {
      layer(l).weight_gradient(move(rate(k, 2 * l), prox), t, x, theta(k + 1), theta(k), theta(0));
    }
    if (d.adapts_bias) {
      layer(l).bias_gradient(move(rate(k, 2 * l + 1), prox), t, theta(k + 1), theta(k), theta(0));
    }
  }

  void query_forward(int k) {
    const Trace* trace = traces(layout.query, k);
    forward(layout.query, trace, k);
    if (k == network.steps) e.store(data.query_outputs, trace[depth - 1].value);
    loss_forward(e, network.loss, layout.query, trace[depth - 1], layout.scalar);
    e.store(data.step_losses.at(k * data.tasks), layout.scalar);
  }

  // lambda += w_k grad L_q(theta_k)
  void add_query(int k) {
    if (!data.evaluates[k]) return;
    query_forward(k);
    const S w = data.step_weights[k];
    if (w == S(0)) return;
    const Trace* trace = traces(layout.query, k);
    backward(layout.query, trace, k);
    const auto add = [w](Num g, Num& out) { out = out + w * g; };
    for (int l = 0; l < depth; ++l) {
      layer(l).weight_gradient(add, trace[l], input(layout.query, trace, l), layout.lambda);
      if (network.layers[l].bias) layer(l).bias_gradient(add, trace[l], layout.lambda);
    }
  }

  void through_step(int k) {
    if (network.elementwise_rates) load_rates(k);
    if (network.learned_rates) add_rate_gradients(k);
    if (network.first_order) return;
    scale_by_rates(k);
    if (network.prox != 0) {
      const S prox = S(network.prox);
      e.map([prox](Num& l, Num& anchor, Num v) { l = l - prox * v, anchor = anchor + prox * v; },
            block(layout.lambda), block(layout.anchor), block(layout.vector));
    }
    subtract_hessian_product(k);
  }

  // The vector a_k * lambda_{k+1}, zero where nothing adapts.
  void scale_by_rates(int k) {
    for (int l = 0; l < depth; ++l) {
      const Dense& d = network.layers[l];
      const DenseLayer<E> at = layer(l);
      scale(d.adapts_weight, k, 2 * l, at.weight(layout.vector), at.weight(layout.lambda),
            at.weight(layout.rate));
      if (d.bias) {
        scale(d.adapts_bias, k, 2 * l + 1, at.bias(layout.vector), at.bias(layout.lambda),
              at.bias(layout.rate));
      }
    }
  }

  void scale(bool adapts, int k, int tensor, View vector, View lambda, View rates) {
    if (!adapts) {
      e.map([](Num& v) { v = Num{}; }, vector);
    } else if (network.elementwise_rates) {
      e.map([](Num& v, Num l, Num a) { v = a * l; }, vector, lambda, rates);
    } else {
      const S a = rate(k, tensor);
      e.map([a](Num& v, Num l) { v = a * l; }, vector, lambda);
    }
  }

  void add_rate_gradients(int k) {  // (3)
    const Trace* trace = traces(layout.support, k);
    const S prox = S(network.prox);
    const auto keep = [prox](Num g, Num& out, Num p, Num anchor) {
      out = g + prox * (p - anchor);
    };
    const int64_t start = layout.parameters;
    for (int l = 0; l < depth; ++l) {
      const Dense& d = network.layers[l];
      DenseLayer<E> at = layer(l);
      at.weight_gradient(keep, trace[l], input(layout.support, trace, l), layout.gradient,
                         weight_of(l, k), theta(0));
      if (d.bias) at.bias_gradient(keep, trace[l], layout.gradient, bias_of(l, k), theta(0));
      if (network.elementwise_rates) continue;
      add_dot(start + k * 2 * depth + 2 * l, at.weight(layout.gradient), at.weight(layout.lambda));
      if (d.bias) {
        add_dot(start + k * 2 * depth + 2 * l + 1, at.bias(layout.gradient),
                at.bias(layout.lambda));
      }
    }
    if (network.elementwise_rates) {
      e.map([](Num& g, Num l) { g = -g * l; }, block(layout.gradient), block(layout.lambda));
      sum_tasks(start + k * layout.parameters, layout.gradient);
    }
  }

  void add_dot(int64_t place, View gradient, View lambda) {
    e.dot(layout.scalar, gradient, lambda);
    e.map([](Num& d) { d = -d; }, layout.scalar);
    e.sum_tasks(place, layout.scalar);
  }

  // lambda -= H_k v, forward over reverse, on what the inner step left.
  void subtract_hessian_product(int k) {
    const Trace* trace = traces(layout.support, k);
    const View* rx = nullptr;
    int first_moved = depth;
    for (int l = 0; l < depth; ++l) {
      const bool moved = layer(l).tangent_forward(input(layout.support, trace, l), rx, trace[l],
                                                  layout.tangents[l], weight_of(l, k),
                                                  layout.vector);
      if (!moved) continue;
      if (first_moved == depth) first_moved = l;
      rx = &layout.tangents[l].value;
    }
    loss_tangent(e, network.loss, layout.support, trace[depth - 1],
                 layout.tangents[depth - 1].value, layout.tangents[depth - 1].delta);
    for (int l = depth - 1; l >= 0; --l) {
      const Tangent& r = layout.tangents[l];
      layer(l).tangent_backward(trace[l], r, l >= first_moved);
      layer(l).subtract_hessian(input(layout.support, trace, l),
                                l > first_moved ? &layout.tangents[l - 1].value : nullptr,
                                trace[l], r, layout.lambda);
      if (l > 0) {
        layer(l).tangent_backward_input(trace[l], r, layout.tangents[l - 1].delta, weight_of(l, k),
                                        layout.vector);
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
