// A task's parameters and examples, loaded into its storage.
#pragma once

#include "losses.h"
#include "step_views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
FASTMETA_ONCE void load_parameters(Step<E>& s) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  s.e.map([](Num& one, Num& zero) { one = Num{} + S(1), zero = Num{}; }, s.layout.one,
          s.layout.zero);
  for (int l = 0; l < s.depth; ++l) {
    const Dense& d = s.network.layers[l];
    for (int i = 0; i < kTensors; ++i) {
      if (!d.has[i] || s.is_dual(l, i)) continue;
      s.e.load(s.layer(l).tensor(i, s.theta(0)), s.data.parameters[l * kTensors + i]);
    }
    if (d.norm == Norm::running) {
      s.e.load(s.layout.layers[l].mean, s.data.statistics[2 * l]);
      s.e.load(s.layout.layers[l].inverse, s.data.statistics[2 * l + 1]);
    }
  }
}

template <class E>
FASTMETA_ONCE void load_loss_inputs(Step<E>& s, const ExamplesOf<E>& set, int k) {
  const auto& from = s.is_query(set) ? s.data.query_loss_inputs : s.data.support_loss_inputs;
  for (std::size_t i = 0; i < std::size_t(set.loss_inputs.size()); ++i) {
    const View& to = set.loss_inputs[i];
    const bool of_examples = s.loss(set).programs->inputs[i].of_examples;
    s.e.load(to, at_step(from[i], k, of_examples ? int64_t(to.rows) * to.cols : 0));
  }
}

template <class E, class S>
FASTMETA_ONCE void load_examples(Step<E>& s, const ExamplesOf<E>& set, Global<const S> y,
                                 Global<const int64_t> labels, Global<const S> weights,
                                 Global<const S> loss_weights, int k = 0) {
  using Num = typename E::Num;
  if (weights.given()) {
    s.e.load(set.weights, weights);
  } else {
    const S each = S(1) / S(set.weights.rows);
    s.e.map([each](Num& w) { w = Num{} + each; }, set.weights);
  }
  if constexpr (E::takes_programs) {
    if (s.loss(set).programs) return load_loss_inputs(s, set, k);
  }
  load_targets(s.e, s.loss(set), set, y, labels, loss_weights);
}

// The masks of a set's pass at step k: of a query set each that is asked for has its own.
template <class E>
FASTMETA_ONCE void load_masks(Step<E>& s, const ExamplesOf<E>& set, const Trace* trace, int k) {
  if constexpr (E::takes_graphs) {
    const auto& masks = s.is_query(set) ? s.data.query_masks : s.data.support_masks;
    if (masks.empty()) return;
    int pass = s.is_query(set) ? 0 : k;
    for (int earlier = 0; s.is_query(set) && earlier < k; ++earlier) {
      pass += s.data.evaluates[earlier] != 0;
    }
    for (int l = 0; l < s.depth; ++l) {
      if (!s.network.layers[l].masked) continue;
      const View to = trace[l].mask;
      s.e.load(to, at_step(masks[l], pass, int64_t(to.rows) * to.cols));
    }
  }
}

// The support set of inner step k, where each has its own; else k is 0. The dual form loads the
// inputs of all steps at k = 0.
template <class E>
FASTMETA_ONCE void load_support(Step<E>& s, int k) {
  const auto& set = s.layout.support;
  const int64_t n = s.network.support, c = set.targets.cols;
  const bool of_classes = s.network.loss.kind == LossKind::cross_entropy;
  if (k == 0 || !s.network.dual) {
    s.support_x = s.e.inputs(set.inputs, at_step(s.data.support_x, k, n * set.inputs.cols));
  }
  load_examples(s, set, at_step(s.data.support_y, k, n * c), at_step(s.data.support_labels, k, n),
                at_step(s.data.support_weights, k, n),
                at_step(s.data.support_loss_weights, k, of_classes ? 0 : n * c), k);
}

template <class E>
FASTMETA_ONCE void load(Step<E>& s) {
  if (!s.loaded) load_parameters(s);
  if (s.network.steps > 0 || !s.network.per_step_support) load_support(s, 0);
  if (s.network.query > 0) {
    s.query_x = s.e.inputs(s.layout.query.inputs, s.data.query_x);
    load_examples(s, s.layout.query, s.data.query_y, s.data.query_labels, s.data.query_weights,
                  s.data.query_loss_weights);
  }
  if (!s.network.dual) return;
  if constexpr (E::takes_products) {
    s.e.load_products(s.layout.dual, s.network.layers.front().adapts[kWeight]);
  } else {
    s.dual().find_grams(s.support_x, s.query_x);
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
