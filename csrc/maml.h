// The meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
//
// Knows layers, their rules and an engine's operations on matrices; nothing about hardware.
#pragma once

#include "chunks.h"
#include "hessian_products.h"
#include "loading.h"
#include "rule_steps.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
FASTMETA_ONCE void inner_step(Step<E>& s, int k) {  // (1)
  if constexpr (E::takes_graphs) {
    if (s.in_chunks()) {
      find_gradient_of_chunks(s, k);
      if (s.network.elementwise_rates) load_rates(s, k);
      return step_by_rule(s, k);
    }
  }
  const auto& support = s.layout.support;
  const Trace* trace = s.traces(support, k);
  if (s.network.per_step_support && k > 0) load_support(s, k);
  load_masks(s, support, trace, k);
  forward_head(s, support, trace, k);
  loss_forward(s.e, s.network.loss, support, trace[s.depth - 1], s.layout.scalar, true);
  s.e.store(s.data.support_losses.at(k * s.data.tasks), s.layout.scalar);
  backward_head(s, support, trace, k);
  if (s.network.elementwise_rates) load_rates(s, k);
  if (!is_plain(s.network.rule)) return step_by_rule(s, k);
  for (int l = s.network.body; l < s.depth; ++l) {
    descend(s, l, k, s.input(support, trace, l), trace[l]);
  }
}

template <class E>
FASTMETA_ONCE void sum_tasks(Step<E>& s, int from, int64_t start, int64_t block) {
  s.parameters(from, block,
               [&](View p, int64_t place) { s.e.sum_tasks(start + place, p, s.e.weight()); });
}

template <class E>
FASTMETA_DEVICE void add_negated_scalar(Step<E>& s, int64_t place) {
  using Num = typename E::Num;
  s.e.map([](Num& d) { d = -d; }, s.layout.scalar);
  s.e.sum_tasks(place, s.layout.scalar, s.e.weight());
}

template <class E>
FASTMETA_ONCE void add_rate_gradients(Step<E>& s, int k) {  // (3)
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const auto& layout = s.layout;
  const Trace* trace = s.traces(layout.support, k);
  const Move<S> keep{S(0), S(1), S(s.network.prox)};
  for (int l = s.network.body; l < s.depth; ++l) {
    const Dense& d = s.network.layers[l];
    DenseLayer<E> at = s.layer(l);
    const Blocks here = s.blocks(l, k);
    for (int i = 0; i < kTensors; ++i) {
      if (!d.has[i] || s.is_dual(l, i)) continue;
      if (!d.adapts[i]) {
        s.clear(at.tensor(i, layout.gradient));
        continue;
      }
      find_gradient(s, i, keep, l, s.input(layout.support, trace, l), trace[l], layout.gradient,
                    here.of[i], s.theta(0));
    }
    for (int i = 0; i < kTensors && !s.network.elementwise_rates; ++i) {
      const int64_t place = layout.parameters + (k * s.depth + l) * kTensors + i;
      if (!d.adapts[i]) continue;
      if (s.is_dual(l, i)) {
        s.dual().rate_gradient(k, layout.scalar, trace[l].product_delta);
        add_negated_scalar(s, place);
      } else {
        s.e.dot(layout.scalar, at.tensor(i, layout.gradient), at.tensor(i, layout.lambda));
        add_negated_scalar(s, place);
      }
    }
  }
  if (s.network.elementwise_rates) {
    s.e.map([](Num& g, Num l) { g = -g * l; }, s.head(layout.gradient), s.head(layout.lambda));
    sum_tasks(s, s.network.body, layout.parameters * (1 + k), layout.gradient);
  }
}

template <class E>
FASTMETA_ONCE void scale(Step<E>& s, int l, int k, int tensor, View vector, View lambda,
                         View rates) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  if (!s.network.layers[l].adapts[tensor]) {
    s.e.map([](Num& v) { v = Num{}; }, vector);
  } else if (s.network.elementwise_rates) {
    s.e.map([](Num& v, Num l, Num a) { v = a * l; }, vector, lambda, rates);
  } else {
    const S a = s.rate(k, l, tensor);
    s.e.map([a](Num& v, Num l) { v = a * l; }, vector, lambda);
  }
}

// The vector a_k * lambda_{k+1}, zero where nothing adapts.
template <class E>
FASTMETA_DEVICE void scale_by_rates(Step<E>& s, int k) {
  for (int l = s.network.body; l < s.depth; ++l) {
    const DenseLayer<E> at = s.layer(l);
    for (int i = 0; i < kTensors; ++i) {
      if (s.network.layers[l].has[i] && !s.is_dual(l, i)) {
        scale(s, l, k, i, at.tensor(i, s.vector(k)), at.tensor(i, s.layout.lambda),
              at.tensor(i, s.layout.rate));
      }
    }
  }
}

// Plain SGD's pullback.
template <class E>
FASTMETA_DEVICE void pull_back_sgd(Step<E>& s, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  if (s.network.reversible && k > 0) go_back(s, k);  // theta_0 is there, and exact
  const bool along = s.network.learned_rates || !s.network.first_order;
  if (s.network.dual && s.network.layers[0].adapts[kWeight] && along) s.dual().find_along(k);
  if (s.network.learned_rates) add_rate_gradients(s, k);
  if (s.network.first_order) return;
  scale_by_rates(s, k);
  if (s.network.prox == 0) return;
  const S prox = S(s.network.prox);
  s.e.map([prox](Num& l, Num& anchor, Num v) { l = l - prox * v, anchor = anchor + prox * v; },
          s.head(s.layout.lambda), s.head(s.layout.anchor), s.head(s.vector(k)));
}

// The derivative by a set's inputs, as it counts in the meta-loss; its sum begins anew.
template <class E>
FASTMETA_ONCE void store_of_inputs(Step<E>& s, const ExamplesOf<E>& set,
                                   Global<typename E::Scalar> to) {
  using Num = typename E::Num;
  const Num weight = s.e.weight();
  s.e.map([weight](Num& d) { d = d * weight; }, set.of_inputs);
  s.e.store(to, set.of_inputs);
  s.clear(set.of_inputs);
}

template <class E>
FASTMETA_ONCE void through_step(Step<E>& s, int k) {
  if (s.network.per_step_support && k < s.network.steps - 1 && !s.in_chunks()) load_support(s, k);
  if (s.network.elementwise_rates) load_rates(s, k);
  if (s.steps_plainly()) {
    pull_back_sgd(s, k);
  } else {
    pull_back_rule(s, k);
  }
  if (s.network.first_order) return;
  if constexpr (E::takes_graphs) {
    if (s.in_chunks()) return subtract_hessian_product_of_chunks(s, k);
  }
  subtract_hessian_product(s, k);
  if constexpr (E::takes_graphs) {
    if (!s.network.inputs_flow || !s.network.per_step_support) return;
    store_of_inputs(s, s.layout.support, s.of_inputs(s.layout.support, k));
  }
}

template <class E>
FASTMETA_ONCE void start_cotangent(Step<E>& s) {
  const auto& layout = s.layout;
  if (s.network.inputs_flow && !s.in_chunks()) {
    s.clear(layout.support.of_inputs);
    s.clear(layout.query.of_inputs);
  }
  s.clear({layout.lambda, 1, int(layout.block), int(layout.block), 1});
  if (s.network.prox != 0) s.clear(s.head(layout.anchor));
  if constexpr (E::takes_programs) {
    s.each_part([&](const auto& part) {
      for (const View& sum : part.support.sums) s.clear(sum);
      for (const View& sum : part.query.sums) s.clear(sum);
    });
  }
  if (s.network.dual) s.dual().start_cotangent();
  if (s.network.body > 0) {
    s.clear(s.body_cotangent(layout.query));
    s.clear(s.body_cotangent(layout.support));
  }
  if (s.steps_plainly() || !sweeps(s.network)) return;
  for (int j = 0; j < states_of(s.network.rule); ++j) s.clear(s.head(layout.cotangents[j]));
  if (!learns_hyperparameters(s.network)) return;
  using Num = typename E::Num;
  s.e.map([](Num& one) { one = Num{} + typename E::Scalar(1); }, s.head(layout.ones));
}

template <class E>
FASTMETA_ONCE void store_adapted(Step<E>& s) {
  for (int l = 0; l < s.depth; ++l) {
    for (int i = 0; i < kTensors; ++i) {
      if (!s.network.layers[l].adapts[i]) continue;
      s.e.store(s.data.adapted[l * kTensors + i], s.layer(l).tensor(i, s.theta(s.network.steps)));
    }
  }
}

template <class E>
FASTMETA_ONCE void add_anchor(Step<E>& s) {  // (5)
  using Num = typename E::Num;
  s.e.map([](Num& l, Num a) { l = l + a; }, s.head(s.layout.lambda), s.head(s.layout.anchor));
}

// The gradients by what losses learn stand last.
template <class E>
FASTMETA_ONCE void sum_captured(Step<E>& s) {
  s.each_part([&](const auto& part) {
    int64_t place = gradient_size(s.network, s.layout) - s.layout.captured;
    for (const auto* set : {&part.support, &part.query}) {
      for (const View& sum : set->sums) {
        s.e.sum_tasks(place, sum, s.e.weight());
        place += sum.cols;
      }
    }
  });
}

template <class E>
FASTMETA_DEVICE void query(Step<E>& s, int k) {
  if constexpr (E::takes_graphs) {
    if (s.in_chunks()) {
      if (s.data.evaluates[k]) add_query_in_chunks(s, k);
      return;
    }
  }
  add_query(s, k);
}

template <class E>
FASTMETA_DEVICE void run_step(Step<E> s) {
  const auto& network = s.network;
  const auto& layout = s.layout;
  load(s);
  if (network.steps > 0) forward_body(s, layout.support);
  if (network.query > 0) forward_body(s, layout.query);
  if (network.differentiate) start_cotangent(s);
  for (int k = 0; k < network.steps; ++k) {
    if (!sweeps(network)) query(s, k);
    inner_step(s, k);
  }
  query(s, network.steps);  // (2)
  if (!network.differentiate) {
    if (!s.data.adapted.empty()) store_adapted(s);
    return;
  }
  for (int k = network.steps - 1; sweeps(network) && k >= 0; --k) {
    through_step(s, k);  // (3), (4)
    query(s, k);
  }
  if (network.prox != 0 && !network.first_order) add_anchor(s);
  backward_body(s, layout.query);
  if (network.steps > 0 && !network.first_order) backward_body(s, layout.support);
  if constexpr (E::takes_graphs) {
    if (network.inputs_flow && !s.in_chunks()) {
      store_of_inputs(s, layout.query, s.of_inputs(layout.query, 0));
      const bool is_shared = network.steps > 0 && !network.per_step_support;
      if (is_shared) store_of_inputs(s, layout.support, s.of_inputs(layout.support, 0));
    }
  }
  if (network.dual) s.dual().finish();
  sum_tasks(s, 0, 0, layout.lambda);
  if constexpr (E::takes_programs) sum_captured(s);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
