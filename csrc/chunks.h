// Passes over sets that go through the layers some examples at a time: storage does not grow with a
// set, what a pass works on stays in the second cache, and threads can share the chunks of one task.
//
// Every part of the chunks sees the storage through a layout of its own, in which block lambda is its
// own gradient; those are added in the order of the parts, however many threads there are.
#pragma once

#include "hessian_products.h"
#include "inner_steps.h"
#include "passes.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// How many rows of the chunk at hand the chunk before has had.
template <class E>
FASTMETA_DEVICE int repeated_rows(const Step<E>& s, const ExamplesOf<E>& set) {
  const int past = (s.at_hand.chunk + 1) * set.weights.rows - s.count(set);
  return past > 0 ? past : 0;
}

// Loads chunk `c` of the set of step k. The last one begins earlier where the chunks do not come out even:
// what it repeats counts for nothing.
template <class E>
FASTMETA_ONCE void load_chunk(Step<E>& s, const ExamplesOf<E>& set, int k, int c) {
  using Num = typename E::Num;
  s.at_hand.chunk = c;
  const int past = repeated_rows(s, set), start = c * set.weights.rows - past;
  s.is_query(set) ? load_query(s, start) : load_support(s, s.network.per_step_support ? k : 0, start);
  load_masks(s, set, s.traces(set, k), k, start);
  if (past > 0) {
    s.e.load(set.row, {s.is_query(set) ? s.data.query_tail : s.data.support_tail, 0});
    s.e.map([](Num& w, Num counts) { w = w * counts; }, set.weights, set.row);
  }
  if (s.network.inputs_flow) s.clear(set.of_inputs);
}

// use(first row in the set, rows of that) of what no chunk before the one at hand has had.
template <class E, class Use>
FASTMETA_DEVICE void with_new_rows(const Step<E>& s, const ExamplesOf<E>& set, Use use) {
  const int rows = set.weights.rows, past = repeated_rows(s, set);
  use(int64_t(s.at_hand.chunk) * rows, [=](View v) { return rows_from(v, past, rows - past); });
}

// The derivative by the set's inputs gains what a pass of the chunk at hand has found, as it counts in the
// meta-loss.
template <class E>
FASTMETA_ONCE void add_of_inputs(Step<E>& s, const ExamplesOf<E>& set, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  with_new_rows(s, set, [&](int64_t first, auto rows) {
    const View found = rows(set.of_inputs), sum = rows(set.of_inputs_before);
    const Global<S> to = s.of_inputs(set, k).at(first * found.cols);
    s.e.load(sum, Global<const S>{to.data, to.task_stride});
    s.e.map([weight = s.e.weight()](Num& sum, Num d) { sum = sum + weight * d; }, sum, found);
    s.e.store(to, sum);
  });
}

// pass(step, set, trace) of every chunk of a set, each in its part's storage.
template <class E, class Pass>
FASTMETA_ONCE void over_chunks(Step<E>& s, bool of_query, int k, Pass pass) {
  s.e.share(s.network.parts, [&](int part) {
    const auto& layout = s.at_hand.parts[part];
    const auto& set = of_query ? layout.query : layout.support;
    E e = s.e.of_part(layout);
    Step<E> own{e, s.network, layout, s.data, s.slot, true};
    own.clear(own.head(layout.lambda));
    own.clear(layout.loss);
    const int chunks = s.network.chunks(own.count(set)), parts = s.network.parts;
    for (int c = part * chunks / parts; c < (part + 1) * chunks / parts; ++c) {
      load_chunk(own, set, k, c);
      pass(own, set, own.traces(set, k));
    }
  });
}

// block += what the parts have found
template <class E>
FASTMETA_ONCE void add_parts(Step<E>& s, int64_t block) {
  using Num = typename E::Num;
  for (int part = 0; part < s.network.parts; ++part) {
    s.e.map([](Num& out, Num one) { out = out + one; }, s.head(block), s.head(s.at_hand.parts[part].lambda));
  }
}
template <class E>
FASTMETA_ONCE void store_loss(Step<E>& s, Global<typename E::Scalar> to) {
  using Num = typename E::Num;
  s.clear(s.layout.scalar);
  for (int part = 0; part < s.network.parts; ++part) {
    s.e.map([](Num& out, Num one) { out = out + one; }, s.layout.scalar, s.at_hand.parts[part].loss);
  }
  s.e.store(to, s.layout.scalar);
}

// Forward and, where asked for, the loss's way back to every layer.
template <class E>
FASTMETA_ONCE void pass_chunk(Step<E>& s, const ExamplesOf<E>& set, const Trace* trace, int k,
                              bool backward) {
  using Num = typename E::Num;
  forward_head(s, set, trace, k);
  if (k == s.network.steps) {  // before the loss, which may overwrite them
    with_new_rows(s, set, [&](int64_t first, auto rows) {
      const View value = trace[s.depth - 1].value;
      s.e.store(s.data.query_outputs.at(first * value.cols), rows(value));
    });
  }
  loss_forward(s.e, s.loss(set), set, trace[s.depth - 1], s.layout.scalar, backward);
  s.e.map([](Num& sum, Num one) { sum = sum + one; }, s.layout.loss, s.layout.scalar);
  if (backward) backward_head(s, set, trace, k);
}

// The support loss of step k, and its gradient.
template <class E>
FASTMETA_ONCE void find_gradient_of_chunks(Step<E>& s, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  over_chunks(s, false, k, [&](Step<E>& own, const ExamplesOf<E>& set, const Trace* trace) {
    pass_chunk(own, set, trace, k, true);
    own.adapting([&](int l, int i) {
      find_gradient(own, i, Add<S>{1}, l, own.input(set, trace, l), trace[l], own.layout.lambda);
    });
  });
  store_loss(s, s.data.support_losses.at(k * s.data.tasks));
  s.clear(s.head(s.gradient(k)));
  add_parts(s, s.gradient(k));
  if (s.network.prox == 0 || k == 0) return;
  s.adapting([&](int l, int i) {
    const DenseLayer<E> at = s.layer(l);
    s.e.map([prox = S(s.network.prox)](Num& g, Num p, Num anchor) { g = g + prox * (p - anchor); },
            at.tensor(i, s.gradient(k)), at.tensor(i, s.theta(k)), at.tensor(i, s.theta(0)));
  });
}

// lambda += w_k grad L_q(theta_k)
template <class E>
FASTMETA_ONCE void add_query_in_chunks(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const S w = s.data.step_weights[k];
  const bool backward = s.network.differentiate && w != S(0);
  over_chunks(s, true, k, [&](Step<E>& own, const ExamplesOf<E>& set, const Trace* trace) {
    pass_chunk(own, set, trace, k, backward);
    if (!backward) return;
    add_query_gradient(own, k, w, set, trace);
    if (own.network.inputs_flow) add_of_inputs(own, set, k);
  });
  store_loss(s, s.data.step_losses.at(k * s.data.tasks));
  if (backward) add_parts(s, s.layout.lambda);
}

// lambda -= H_k v
template <class E>
FASTMETA_ONCE void subtract_hessian_product_of_chunks(Step<E>& s, int k) {
  over_chunks(s, false, k, [&](Step<E>& own, const ExamplesOf<E>& set, const Trace* trace) {
    if (!own.network.keeps_chunks) pass_chunk(own, set, trace, k, true);
    subtract_hessian_product(own, k);
    if (own.network.inputs_flow) add_of_inputs(own, set, k);
  });
  add_parts(s, s.layout.lambda);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
