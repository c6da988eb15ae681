// Passes of a set of examples through the network at some theta: forward, backward, into lambda.
#pragma once

#include "epilogues.h"
#include "loading.h"
#include "losses.h"
#include "step_views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
FASTMETA_ONCE void forward(Step<E>& s, const ExamplesOf<E>& set, const Trace* trace, int k,
                           int from, int to) {
  for (int l = from; l < to; ++l) {
    const Blocks at = s.blocks(l, k);
    const Dense& d = s.network.layers[l];
    const View plus = d.plus == kNone ? View{} : s.output(set, trace, d.plus);
    if (s.is_dual(l, kWeight)) {
      const View bias = s.layer(l).row(kBias, at.of[kBias]);
      s.dual().forward(s.is_query(set), k, trace[l].product,
                       d.has[kBias] ? &bias : nullptr);
      s.layer(l).after_product(trace[l], at);
    } else {
      s.layer(l).forward(s.input(set, trace, l), trace[l], d.plus == kNone ? nullptr : &plus, at);
    }
  }
}
template <class E>
FASTMETA_DEVICE void forward_body(Step<E>& s, const ExamplesOf<E>& set) {
  forward(s, set, s.traces(set, 0), 0, 0, s.network.body);
}
template <class E>
FASTMETA_DEVICE void forward_head(Step<E>& s, const ExamplesOf<E>& set, const Trace* trace, int k) {
  forward(s, set, trace, k, s.network.body, s.depth);
}

template <class E>
FASTMETA_ONCE void backward(Step<E>& s, const Trace* trace, int k, int from, int to) {
  using S = typename E::Scalar;
  for (int l = to - 1; l >= from; --l) {
    const Blocks at = s.blocks(l, k);
    DenseLayer<E> layer = s.layer(l);
    layer.backward(trace[l], at);
    for_each_read<E>(s.network.layers[l], [&](int read, bool is_plus, bool adds) {
      if (read < from) return;
      const View out = trace[read].delta;
      adds ? layer.backward_input(Add<S>{1}, trace[l], out, at, is_plus)
           : layer.backward_input(Keep{}, trace[l], out, at, is_plus);
    });
  }
}
// From the loss down to the first layer whose gradient is asked for, leaving every layer's delta at its
// product.
template <class E>
FASTMETA_DEVICE void backward_head(Step<E>& s, const ExamplesOf<E>& set, const Trace* trace,
                                   int k) {
  loss_backward(s.e, s.loss(set), set, trace[s.depth - 1]);
  backward(s, trace, k, s.is_query(set) ? s.network.body : s.network.still, s.depth);
}

// lambda += w times the gradient of a layer.
template <class E>
FASTMETA_ONCE void add_gradient(Step<E>& s, typename E::Scalar w, const ExamplesOf<E>& set,
                                const Trace* trace, int l) {
  const Add<typename E::Scalar> add{w};
  if (!s.is_dual(l, kWeight)) {
    if (s.network.layers[l].has[kWeight]) {
      s.layer(l).weight_gradient(add, trace[l], s.input(set, trace, l), s.layout.lambda);
    }
  } else if (s.is_query(set)) {
    s.dual().add_query(w, trace[l].product_delta);
  } else {
    s.dual().add_support(trace[l].product_delta);
  }
  for (int row = kBias; row < kTensors; ++row) {
    if (s.network.layers[l].has[row]) s.layer(l).row_gradient(row, add, trace[l], s.layout.lambda);
  }
}

// use(layer, whether it is added to its product, where its share is added) of every read of layers from
// `from` to `to` that crosses the border before them: of the body's output or of the data, where
// derivatives by those are asked for.
template <class E, class Use>
FASTMETA_DEVICE void for_each_outside(Step<E>& s, const ExamplesOf<E>& set, int from, int to, Use use) {
  for (int l = from; l < to; ++l) {
    for_each_read<E>(s.network.layers[l], [&](int read, bool is_plus, bool) {
      if (read >= from) return;
      if (read != kData) return use(l, is_plus, s.body_cotangent(set));
      if constexpr (E::takes_graphs) {
        if (s.network.inputs_flow) use(l, is_plus, set.of_inputs);
      }
    });
  }
}

// lambda += the body's gradient, of what the steps have summed after it.
template <class E>
FASTMETA_ONCE void backward_body(Step<E>& s, const ExamplesOf<E>& set) {
  using S = typename E::Scalar;
  const Trace* trace = s.traces(set, 0);
  backward(s, trace, 0, 0, s.network.body);
  for_each_outside(s, set, 0, s.network.body, [&](int l, bool is_plus, View out) {
    s.layer(l).backward_input(Add<S>{1}, trace[l], out, s.blocks(l, 0), is_plus);
  });
  for (int l = 0; l < s.network.body; ++l) add_gradient(s, typename E::Scalar(1), set, trace, l);
}

template <class E>
FASTMETA_DEVICE void query_forward(Step<E>& s, int k) {
  const Trace* trace = s.traces(s.layout.query, k);
  load_masks(s, s.layout.query, trace, k);
  forward_head(s, s.layout.query, trace, k);
  if (k == s.network.steps) s.e.store(s.data.query_outputs, trace[s.depth - 1].value);
  const bool backward = s.network.differentiate && s.data.step_weights[k] != 0;
  loss_forward(s.e, s.network.query_loss, s.layout.query, trace[s.depth - 1], s.layout.scalar,
               backward);
  s.e.store(s.data.step_losses.at(k * s.data.tasks), s.layout.scalar);
}

// lambda += w times the gradient of the query loss, whose way back is through.
template <class E>
FASTMETA_ONCE void add_query_gradient(Step<E>& s, int k, typename E::Scalar w,
                                      const ExamplesOf<E>& query, const Trace* trace) {
  const int body = s.network.body;
  if constexpr (E::takes_programs) add_captured(s.e, query, w);
  for (int l = body; l < s.depth; ++l) add_gradient(s, w, query, trace, l);
  for_each_outside(s, query, body, s.depth, [&](int l, bool is_plus, View out) {
    s.layer(l).backward_input(Add<typename E::Scalar>{w}, trace[l], out, s.blocks(l, k), is_plus);
  });
}

// lambda += w_k grad L_q(theta_k)
template <class E>
FASTMETA_ONCE void add_query(Step<E>& s, int k) {
  using S = typename E::Scalar;
  if (!s.data.evaluates[k]) return;
  query_forward(s, k);
  const S w = s.data.step_weights[k];
  if (!s.network.differentiate || w == S(0)) return;
  const ExamplesOf<E>& query = s.layout.query;
  const Trace* trace = s.traces(query, k);
  backward_head(s, query, trace, k);
  add_query_gradient(s, k, w, query, trace);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
