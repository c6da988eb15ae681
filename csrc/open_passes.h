// The passes of a slot by themselves, for losses and update rules that are computed outside.
#pragma once

#include "hessian_products.h"
#include "inner_steps.h"
#include "open_call.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class OpenStep {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  OpenStep(Step<E>& step, const OpenCall<S>& call)
      : s(step),
        call(call),
        k(call.slot),
        set(k < s.network.steps ? s.layout.support : s.layout.query),
        trace(s.traces(set, k)) {
    s.support_x = s.query_x = s.e.inputs(set.inputs, s.data.support_x);
  }

  void run() {
    switch (call.pass) {
      case OpenPass::forward: return forward();
      case OpenPass::backward: return backward();
      case OpenPass::tangent: return tangent();
      case OpenPass::tangent_backward: return tangent_backward();
    }
  }

 private:
  Step<E>& s;
  const OpenCall<S>& call;
  const int k;
  const ExamplesOf<E>& set;
  const Trace* const trace;

  int last() const { return s.depth - 1; }

  void forward() {
    s.e.map([](Num& one, Num& zero) { one = Num{} + S(1), zero = Num{}; }, s.layout.one,
            s.layout.zero);
    for (int l = 0; l < s.depth; ++l) {
      const Blocks at = s.blocks(l, k);
      for (int i = 0; i < kTensors; ++i) {
        const auto& from = s.data.parameters[l * kTensors + i];
        if (from.given()) s.e.load(s.layer(l).tensor(i, at.of[i]), from);
      }
      if (s.data.statistics.empty() || !s.data.statistics[2 * l].given()) continue;
      s.e.load(s.layout.layers[l].mean, s.data.statistics[2 * l]);
      s.e.load(s.layout.layers[l].inverse, s.data.statistics[2 * l + 1]);
    }
    FASTMETA_NAMESPACE::forward(s, set, trace, k, 0, s.depth);
    s.e.store(call.output, trace[last()].value);
  }

  void backward() {
    s.e.load(trace[last()].delta, call.flowing);
    FASTMETA_NAMESPACE::backward(s, trace, k, 0, s.depth);
    for_each_asked([&](int l, int i) {
      find_gradient(s, i, Keep{}, l, s.input(set, trace, l), trace[l], s.layout.lambda);
    });
    if (!call.of_input.given()) return;
    s.clear(set.of_inputs);
    for (int l = 0; l < s.depth; ++l) {
      for_each_read<E>(s.network.layers[l], [&](int read, bool is_plus, bool) {
        if (read != kData) return;
        s.layer(l).backward_input(Add<S>{1}, trace[l], set.of_inputs, s.blocks(l, k), is_plus);
      });
    }
    s.e.store(call.of_input, set.of_inputs);
  }

  void tangent() {
    for (int l = 0; l < s.depth; ++l) {
      for (int i = 0; i < kTensors; ++i) {
        // A norm reads its rows' vectors, also where they do not adapt.
        if (!s.network.layers[l].has[i]) continue;
        const View v = s.layer(l).tensor(i, s.vector(k));
        const auto& from = call.vectors[l * kTensors + i];
        if (from.given()) {
          s.e.load(v, from);
        } else if (i != kWeight || s.network.layers[l].adapts[i]) {
          s.clear(v);
        }
      }
    }
    tangent_forward(s, k);
    s.e.store(call.output, s.layout.tangents[last()].value);
  }

  void tangent_backward() {
    s.e.load(s.layout.tangents[last()].delta, call.flowing);
    s.clear({s.layout.lambda, 1, int(s.layout.block), int(s.layout.block), 1});
    const bool flows = call.of_input.given();
    if (flows) s.clear(set.of_inputs);
    const auto add_input = [&](int, int l, bool is_plus) {
      if (!flows) return;
      s.layer(l).tangent_backward_input(Add<S>{1}, trace[l], s.layout.tangents[l], set.of_inputs,
                                        s.blocks(l, k), s.vector(k), is_plus);
    };
    FASTMETA_NAMESPACE::tangent_backward(s, k, S(1), s.layout.lambda, add_input);
    if (flows) s.e.store(call.of_input, set.of_inputs);
    for_each_asked([](int, int) {});
  }

  // Gives the gradients, each in block lambda after `find(layer, tensor)`.
  template <class Find>
  void for_each_asked(Find find) {
    int64_t place = 0;
    for (int l = 0; l < s.depth; ++l) {
      for (int i = 0; i < kTensors; ++i) {
        if (!s.network.layers[l].has[i]) continue;
        const View g = s.layer(l).tensor(i, s.layout.lambda);
        const Global<S>& to = call.gradients[l * kTensors + i];
        if (to.given()) {
          find(l, i);
          to.task_stride > 0 ? s.e.store(to, g) : s.e.sum_tasks(place, g, s.e.weight());
        }
        place += int64_t(g.rows) * g.cols;
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
