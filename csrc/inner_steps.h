// The inner loop: a step of plain SGD (1), and the way back (12).
#pragma once

#include "passes.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// use(gradient of a tensor, out, in...), each in its block.
template <class E, class Use, class... Offsets>
FASTMETA_ONCE void find_gradient(Step<E>& s, int tensor, Use use, int l, View x, const Trace& t,
                                 int64_t out, Offsets... in) {
  if (tensor == kWeight) {
    s.layer(l).weight_gradient(use, t, x, out, in...);
  } else {
    s.layer(l).row_gradient(Tensor(tensor), use, t, out, in...);
  }
}

template <class E>
FASTMETA_DEVICE void load_rates(Step<E>& s, int k) {
  const auto rates = s.data.elementwise_rates.at(k * s.layout.parameters);
  s.parameters(s.network.body, s.layout.rate,
               [&](View p, int64_t place) { s.e.load(p, rates.at(place)); });
}

// What adapts of a layer goes from one block to another, by factor(rate) along the gradient.
template <class E, class Factor>
FASTMETA_DEVICE void move(Step<E>& s, int l, int k, View x, const Trace& t, int64_t to,
                          int64_t from, Factor factor) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const DenseLayer<E> at = s.layer(l);
  const S prox = S(s.network.prox);
  for (int i = 0; i < kTensors; ++i) {
    if (!s.network.layers[l].adapts[i] || s.is_dual(l, i)) continue;
    if (!s.network.elementwise_rates) {
      const S along = factor(s.rate(k, l, i));
      if (prox == 0) {
        find_gradient(s, i, AddTo<S>{along}, l, x, t, to, from);
      } else {
        find_gradient(s, i, Move<S>{S(1), along, prox}, l, x, t, to, from, s.theta(0));
      }
      continue;
    }
    find_gradient(s, i, Keep{}, l, x, t, s.layout.gradient);
    s.e.map([factor, prox](Num& out, Num g, Num p, Num anchor,
                           Num a) { out = p + factor(a) * (g + prox * (p - anchor)); },
            at.tensor(i, to), at.tensor(i, s.layout.gradient), at.tensor(i, from),
            at.tensor(i, s.theta(0)), at.tensor(i, s.layout.rate));
  }
}

template <class E>
FASTMETA_ONCE void descend(Step<E>& s, int l, int k, View x, const Trace& t) {
  if (s.is_dual(l, kWeight) && s.network.layers[l].adapts[kWeight]) {
    s.dual().descend(k, s.rate(k, l, kWeight), t.product_delta);
  }
  move(s, l, k, x, t, s.theta(k + 1), s.theta(k), [](auto a) { return -a; });
}

// (12), in place of theta_{k+1}. The gradient is made of the deltas that the inner step left, never
// of weights that were rebuilt: their errors only add.
template <class E>
FASTMETA_DEVICE void go_back(Step<E>& s, int k) {
  using S = typename E::Scalar;
  const Trace* trace = s.traces(s.layout.support, k);
  const S prox = S(s.network.prox);
  for (int l = s.network.body; l < s.depth; ++l) {
    move(s, l, k, s.input(s.layout.support, trace, l), trace[l], s.theta(k), s.theta(k + 1),
         [prox](auto a) { return a / (S(1) - prox * a); });
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
