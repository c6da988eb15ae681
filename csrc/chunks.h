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

// Loads chunk `c` of the set of step k; its first row. The last one begins earlier where the chunks do
// not come out even: what it repeats counts for nothing.
template <class E>
FASTMETA_ONCE int load_chunk(Step<E>& s, const ExamplesOf<E>& set, int k, int c) {
  using Num = typename E::Num;
  const int rows = set.weights.rows, past = (c + 1) * rows - s.count(set);
  const int start = c * rows - (past > 0 ? past : 0);
  s.at_hand.chunk = c;
  s.is_query(set) ? load_query(s, start) : load_support(s, s.network.per_step_support ? k : 0, start);
  load_masks(s, set, s.traces(set, k), k, start);
  if (past > 0) {
    s.e.load(set.row, {s.is_query(set) ? s.data.query_tail : s.data.support_tail, 0});
    s.e.map([](Num& w, Num counts) { w = w * counts; }, set.weights, set.row);
  }
  return start;
}

// pass(step, set, trace, first row) of every chunk of a set, each in its part's storage.
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
      const int start = load_chunk(own, set, k, c);
      pass(own, set, own.traces(set, k), start);
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
  loss_forward(s.e, s.loss(set), set, trace[s.depth - 1], s.layout.scalar, backward);
  s.e.map([](Num& sum, Num one) { sum = sum + one; }, s.layout.loss, s.layout.scalar);
  if (backward) backward_head(s, set, trace, k);
}

// The support loss of step k, and its gradient.
template <class E>
FASTMETA_ONCE void find_gradient_of_chunks(Step<E>& s, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  over_chunks(s, false, k, [&](Step<E>& own, const ExamplesOf<E>& set, const Trace* trace, int) {
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
  over_chunks(s, true, k, [&](Step<E>& own, const ExamplesOf<E>& set, const Trace* trace, int start) {
    pass_chunk(own, set, trace, k, backward);
    const View value = trace[own.depth - 1].value;
    if (k == own.network.steps) {  // of rows that come twice by the chunk that counts them
      const int first = own.at_hand.chunk * value.rows - start;
      const View rows = rows_from(value, first, value.rows - first);
      own.e.store(own.data.query_outputs.at(int64_t(start + first) * value.cols), rows);
    }
    if (!backward) return;
    add_captured(own.e, set, w);
    for (int l = 0; l < own.depth; ++l) add_gradient(own, w, set, trace, l);
  });
  store_loss(s, s.data.step_losses.at(k * s.data.tasks));
  if (backward) add_parts(s, s.layout.lambda);
}

// lambda -= H_k v
template <class E>
FASTMETA_ONCE void subtract_hessian_product_of_chunks(Step<E>& s, int k) {
  over_chunks(s, false, k, [&](Step<E>& own, const ExamplesOf<E>& set, const Trace* trace, int) {
    if (!own.network.keeps_chunks) pass_chunk(own, set, trace, k, true);
    subtract_hessian_product(own, k);
  });
  add_parts(s, s.layout.lambda);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
