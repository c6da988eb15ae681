// The meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
//
// Knows layers, their rules and an engine's operations on matrices; nothing about hardware.
#pragma once

#include "dense.h"
#include "dual.h"
#include "epilogues.h"
#include "losses.h"
#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class MetaStep {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;
  using Description = DescriptionIn<typename E::Place>;
  using Layout = LayoutIn<typename E::Place>;
  using Examples = ExamplesIn<typename E::Place>;
  using Data = fastmeta::Data<S, typename E::Place>;

  FASTMETA_DEVICE MetaStep(E& engine, const Description& network, const Layout& layout,
                           const Data& data, int slot, bool loaded)
      : e(engine),
        network(network),
        layout(layout),
        data(data),
        depth(int(network.layers.size())),
        slot(slot),
        loaded(loaded) {}

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
  E& e;
  const Description& network;
  const Layout& layout;
  const Data& data;
  const int depth, slot;  // slot: of this task among those together
  const bool loaded;      // whether an earlier task left the parameters here
  View support_x{}, query_x{};  // where the inputs lie

  // What a block holds of the layers after the body.
  FASTMETA_DEVICE View head(int64_t block) const {
    const int size = int(layout.block - layout.body);
    return {block + layout.body, 1, size, size, 1};
  }
  FASTMETA_DEVICE void clear(View v) {
    e.map([](Num& out) { out = Num{}; }, v);
  }
  FASTMETA_DEVICE DenseLayer<E> layer(int l) { return {e, network.layers[l], layout.layers[l]}; }
  FASTMETA_DEVICE DualProduct<E> dual() { return {e, network, layout.dual, slot}; }
  FASTMETA_DEVICE bool is_dual(int l, int tensor) const {
    return network.dual && l == 0 && tensor == kWeight;
  }
  FASTMETA_DEVICE bool is_query(const Examples& set) const { return &set == &layout.query; }

  // The block of theta_k. Those of all steps share one, where they are not kept.
  FASTMETA_DEVICE int64_t theta(int k) const {
    const int slot = keeps_weights(network) || k == 0 ? k : 1;
    return layout.theta + slot * (layout.block - layout.body);
  }
  // The blocks where theta_k is found: what does not adapt stays in theta_0.
  FASTMETA_DEVICE Blocks blocks(int l, int k) const {
    Blocks at;
    for (int i = 0; i < kTensors; ++i) at.of[i] = theta(network.layers[l].adapts[i] ? k : 0);
    return at;
  }

  FASTMETA_DEVICE const Trace* traces(const Examples& set, int k) const {
    const bool kept = &set == &layout.support && layout.traces_kept > 1;
    return &set.traces[kept ? k * depth : 0];
  }
  FASTMETA_DEVICE View input(const Examples& set, const Trace* trace, int l) const {
    return l > 0 ? trace[l - 1].value : is_query(set) ? query_x : support_x;
  }
  // Where the steps sum the derivative by the body's output [N, H]: its last layer's delta.
  FASTMETA_DEVICE View body_cotangent(const Examples& set) const {
    return set.traces[network.body - 1].delta;
  }

  // use(parameter of a block, its place among the P numbers of all), from that layer on
  template <class Use>
  FASTMETA_DEVICE void parameters(int from, int64_t block, Use use) {
    int64_t place = 0;
    for (int l = 0; l < depth; ++l) {
      for (int i = 0; i < kTensors; ++i) {
        if (!network.layers[l].has[i]) continue;
        const View p = layer(l).tensor(i, block);
        if (l >= from && !is_dual(l, i)) use(p, place);
        place += int64_t(p.rows) * p.cols;
      }
    }
  }
  FASTMETA_DEVICE void sum_tasks(int from, int64_t start, int64_t block) {
    parameters(from, block,
               [&](View p, int64_t place) { e.sum_tasks(start + place, p, e.weight()); });
  }
  FASTMETA_DEVICE void load_rates(int k) {
    const auto rates = data.elementwise_rates.at(k * layout.parameters);
    parameters(network.body, layout.rate,
               [&](View p, int64_t place) { e.load(p, rates.at(place)); });
  }
  FASTMETA_DEVICE S rate(int k, int l, int tensor) const {
    return data.rates[(k * depth + l) * kTensors + tensor];
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
        gradient(i, Move<S>{S(1), factor(rate(k, l, i)), prox}, l, x, t, to, from, theta(0));
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
            head(layout.lambda), head(layout.anchor), head(layout.vector));
    }
    subtract_hessian_product(k);
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

  // The vector a_k * lambda_{k+1}, zero where nothing adapts.
  FASTMETA_DEVICE void scale_by_rates(int k) {
    for (int l = network.body; l < depth; ++l) {
      const DenseLayer<E> at = layer(l);
      for (int i = 0; i < kTensors; ++i) {
        if (network.layers[l].has[i] && !is_dual(l, i)) {
          scale(l, k, i, at.tensor(i, layout.vector), at.tensor(i, layout.lambda),
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
        moved = layer(l).tangent_product(input(layout.support, trace, l), rx, r, at, layout.vector);
      } else if (moved) {
        dual().tangent_forward(rate(k, l, kWeight), r.value);
      }
      moved = layer(l).tangent_forward(moved, trace[l], r, at, layout.vector);
      if (!moved) continue;
      if (first_moved == depth) first_moved = l;
      rx = &layout.tangents[l].value;
    }
    if (first_moved == depth) return;  // nothing adapts
    loss_tangent(e, network.loss, layout.support, trace[depth - 1],
                 layout.tangents[depth - 1].value, layout.tangents[depth - 1].delta);
    for (int l = depth - 1; l >= network.body; --l) {
      const Tangent& r = layout.tangents[l];
      layer(l).tangent_backward(trace[l], r, blocks(l, k), layout.vector, l >= first_moved);
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
                                        blocks(l, k), layout.vector);
      } else if (l > 0) {
        layer(l).tangent_backward_input(Add<S>{S(-1)}, trace[l], r, body_cotangent(layout.support),
                                        blocks(l, k), layout.vector);
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
