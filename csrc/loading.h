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
FASTMETA_ONCE void load_loss_inputs(Step<E>& s, const ExamplesOf<E>& set, int k, int start) {
  const auto& from = s.is_query(set) ? s.data.query_loss_inputs : s.data.support_loss_inputs;
  for (std::size_t i = 0; i < std::size_t(set.loss_inputs.size()); ++i) {
    const View& to = set.loss_inputs[i];
    const bool of_examples = s.loss(set).programs->inputs[i].of_examples;
    const int64_t step = of_examples ? int64_t(s.count(set)) * to.cols : 0;
    const int64_t row = of_examples ? to.cols : 0;
    s.e.load(to, at_step(at_step(from[i], k, step), start, row));
  }
}

template <class E, class S>
FASTMETA_ONCE void load_examples(Step<E>& s, const ExamplesOf<E>& set, Global<const S> y,
                                 Global<const int64_t> labels, Global<const S> weights,
                                 Global<const S> loss_weights, Global<const S> mass, int k = 0,
                                 int start = 0) {
  using Num = typename E::Num;
  if (weights.given()) {
    s.e.load(set.weights, weights);
  } else {
    const S each = S(1) / S(s.count(set));
    s.e.map([each](Num& w) { w = Num{} + each; }, set.weights);
  }
  if constexpr (E::takes_programs) {
    if (s.loss(set).programs) return load_loss_inputs(s, set, k, start);
  }
  load_targets(s.e, s.loss(set), set, y, labels, loss_weights, mass);
}

// The masks of a set's pass at step k: of a query set each that is asked for has its own.
template <class E>
FASTMETA_ONCE void load_masks(Step<E>& s, const ExamplesOf<E>& set, const Trace* trace, int k,
                              int start = 0) {
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
      s.e.load(to, masks[l].at((int64_t(pass) * s.count(set) + start) * to.cols));
    }
  }
}

// Rows of the k-th support set from `start` on, as many as there is room for. Where all steps share
// one k is 0. The dual form loads the inputs of all steps at k = 0.
template <class E>
FASTMETA_ONCE void load_support(Step<E>& s, int k, int start = 0) {
  const auto& set = s.layout.support;
  const int64_t n = s.network.support, c = set.targets.cols;
  const bool of_classes = s.network.loss.kind == LossKind::cross_entropy;
  const auto from = [&](auto all, int64_t row) { return at_step(at_step(all, k, n * row), start, row); };
  if (k == 0 || !s.network.dual) {
    s.support_x = s.e.inputs(set.inputs, from(s.data.support_x, set.inputs.cols));
  }
  load_examples(s, set, from(s.data.support_y, c), from(s.data.support_labels, 1),
                from(s.data.support_weights, 1), from(s.data.support_loss_weights, of_classes ? 0 : c),
                at_step(s.data.support_mass, k, 1), k, start);
}
template <class E>
FASTMETA_ONCE void load_query(Step<E>& s, int start = 0) {
  const auto& set = s.layout.query;
  const int64_t c = set.targets.cols;
  const bool of_classes = s.network.query_loss.kind == LossKind::cross_entropy;
  const auto from = [&](auto all, int64_t row) { return at_step(all, start, row); };
  s.query_x = s.e.inputs(set.inputs, from(s.data.query_x, set.inputs.cols));
  load_examples(s, set, from(s.data.query_y, c), from(s.data.query_labels, 1),
                from(s.data.query_weights, 1), from(s.data.query_loss_weights, of_classes ? 0 : c),
                s.data.query_mass, 0, start);
}

template <class E>
FASTMETA_ONCE void load(Step<E>& s) {
  if (!s.loaded) load_parameters(s);
  if (s.in_chunks()) return;  // which load their examples
  if (s.network.steps > 0 || !s.network.per_step_support) load_support(s, 0);
  if (s.network.query > 0) load_query(s);
  if (!s.network.dual) return;
  if constexpr (E::takes_products) {
    s.e.load_products(s.layout.dual, s.network.layers.front().adapts[kWeight]);
  } else {
    s.dual().find_grams(s.support_x, s.query_x);
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
