// The inner loop's update rule on a task's blocks of parameters: a step, and its pullback. Element by
// element: csrc/update_rules.h. Equations: docs/design.md.
#pragma once

#include "gather.h"
#include "task_views.h"

#include "../../update_rules.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T>
class Updates {
 public:
  explicit Updates(const TaskViews<T>& views) : s(views), n(views.n) {}

  // No cotangent of the state yet.
  void begin() const {
    for (int j = 0; !is_plain(n.rule) && j < states_of(n.rule); ++j) {
      conv::clear(s.cotangent(j), s.layout.block);
    }
  }

  // From theta_k to theta_{k+1} along the support loss's gradient, to which prox's is added.
  void step(int k) const { is_plain(n.rule) ? step_plainly(k) : step_by_rule(k); }

  // From the cotangents of theta_{k+1} and the state to those of theta_k and the state before, but
  // for what goes through the support loss: the vector is the cotangent of its gradient.
  void pull_back(int k) const {
    conv::clear(s.vector(), s.layout.block);
    is_plain(n.rule) ? pull_back_plainly(k) : pull_back_rule(k);
  }

 private:
  using N = Num<T>;
  const TaskViews<T>& s;
  const Network& n;

  void step_plainly(int k) const {
    T* const g = s.gradient(k);
    const T *const here = s.parameters(k), *const anchor = s.parameters(0);
    T* const next = s.theta(k + 1);
    const T prox = T(n.prox);
    s.head_tensors([&](int l, int i, int64_t from, int64_t size) {
      const auto a = s.rate(k, l, i);
      const bool adapts = n.blocks[l].adapts[i];
      for (int64_t j = from; j < from + size; ++j) {
        g[j] += prox * (here[j] - anchor[j]);
        next[j] = adapts ? here[j] - a(j) * g[j] : here[j];
      }
    });
  }

  void pull_back_plainly(int k) const {
    T *const lambda = s.lambda(), *const vector = s.vector(), *const anchor = s.anchor();
    const T* const g = s.gradient(k);
    const T weight = s.call.task_weights[s.task];
    // The vector is -a_k * lambda_{k+1}, so that its products add to lambda.
    s.adapting([&](int l, int i, int64_t from, int64_t size) {
      const auto a = s.rate(k, l, i);
      for (int64_t j = from; j < from + size; ++j) vector[j] = -a(j) * lambda[j];
      if (!n.learned_rates) return;
      if (n.elementwise_rates) {
        T* const each = s.rate_sums(k);
        for (int64_t j = from; j < from + size; ++j) each[j] -= weight * lambda[j] * g[j];
        return;
      }
      T along = 0;
      for (int64_t j = from; j < from + size; ++j) along += lambda[j] * g[j];
      *s.rate_sum(k, l, i) -= weight * along;
    });
    if (n.first_order || n.prox == 0) return;
    s.add(T(n.prox), vector, s.layout.block, lambda);
    s.add(T(1), vector, s.layout.block, anchor);
  }

  // What fills up channels is zero in every block: parameters, gradients, states, cotangents.
  static T dot(const T* a, const T* b, int64_t size) {
    N sum{};
    for (int64_t j = 0; j < size; j += lanes<T>) sum += conv::load(a + j) * conv::load(b + j);
    return total(sum);
  }
  static T total(N sum) {
    T each[lanes<T>], all = 0;
    conv::store(each, sum);
    for (T one : each) all += one;
    return all;
  }

  void step_by_rule(int k) const {
    T* const g = s.gradient(k);
    const T *const here = s.parameters(k), *const anchor = s.parameters(0);
    T* const next = s.theta(k + 1);
    const T prox = T(n.prox);
    T square = 0;
    s.head_tensors([&](int l, int i, int64_t from, int64_t size) {
      if (!n.blocks[l].adapts[i]) {
        for (int64_t j = from; j < from + size; ++j) next[j] = here[j];
        return;
      }
      for (int64_t j = from; prox != T(0) && k > 0 && j < from + size; ++j) {
        g[j] += prox * (here[j] - anchor[j]);
      }
      if (n.rule.clips) square += dot(g + from, g + from, size);
    });
    if (n.rule.clips) {
      const T norm = T(__builtin_sqrt(square)), most = T(s.call.rule_options[kMaxNorm]);
      const T clip = s.clip(k) = norm > most ? most / norm : T(1);
      if (clip < T(1)) {
        s.adapting([&](int, int, int64_t from, int64_t size) {
          for (int64_t j = from; j < from + size; ++j) g[j] *= clip;
        });
      }
    }
    with_rule<T>(n.rule, s.call.rule_options, k, [&](auto rule) {
      s.adapting([&](int l, int i, int64_t from, int64_t size) {
        step_tensor(rule, k, s.rate(k, l, i), from, from + size);
      });
    });
  }

  template <class Rule>
  void step_tensor(const Rule& rule, int k, const typename TaskViews<T>::Rate& rate, int64_t from,
                   int64_t end) const {
    const T *const here = s.parameters(k), *const g = s.gradient(k);
    T* const next = s.theta(k + 1);
    for (int64_t i = from; i < end; i += lanes<T>) {
      N before[Rule::states], after[Rule::states];
      for (int j = 0; j < Rule::states; ++j) before[j] = state_before(j, k, i);
      const N p = conv::load(here + i);
      conv::store(next + i, stepped(rule, p, conv::load(g + i), rate.vector(i), before, after));
      for (int j = 0; j < Rule::states; ++j) conv::store(s.state(j, k + 1) + i, after[j]);
    }
  }
  N state_before(int j, int k, int64_t i) const {
    return k > 0 ? conv::load(s.state(j, k) + i) : N{};
  }

  void pull_back_rule(int k) const {
    with_rule<T>(n.rule, s.call.rule_options, k, [&](auto rule) {
      s.adapting([&](int l, int i, int64_t from, int64_t size) {
        if (fastmeta::conv::learns_hyperparameters(n)) add_slopes(rule, k, l, i, from, from + size);
        pull_back_tensor(rule, k, s.rate(k, l, i), from, from + size);
      });
    });
    if (n.first_order) return;
    if (n.rule.clips && s.clip(k) < T(1)) pull_back_clip(k);
    if (n.prox != 0 && k > 0) pull_back_prox(k);  // at step 0 its two parts cancel
  }

  template <class Rule>
  void pull_back_tensor(const Rule& rule, int k, const typename TaskViews<T>::Rate& rate,
                        int64_t from, int64_t end) const {
    const T *const here = s.parameters(k), *const g = s.gradient(k);
    T *const lambda = s.lambda(), *const vector = s.vector();
    for (int64_t i = from; i < end; i += lanes<T>) {
      N after[Rule::states], cotangent[Rule::states];
      for (int j = 0; j < Rule::states; ++j) {
        after[j] = conv::load(s.state(j, k + 1) + i), cotangent[j] = conv::load(s.cotangent(j) + i);
      }
      N along = conv::load(lambda + i);
      const N p = conv::load(here + i);
      conv::store(vector + i, pulled_back(rule, p, conv::load(g + i), rate.vector(i), after, along,
                                          cotangent));
      conv::store(lambda + i, along);
      for (int j = 0; j < Rule::states; ++j) conv::store(s.cotangent(j) + i, cotangent[j]);
    }
  }

  // The gradients of rates and options, from the cotangents after the step.
  template <class Rule>
  void add_slopes(const Rule& rule, int k, int l, int tensor, int64_t from, int64_t end) const {
    const T *const here = s.parameters(k), *const g = s.gradient(k);
    const auto rate = s.rate(k, l, tensor);
    const T weight = s.call.task_weights[s.task];
    T* const each = n.learned_rates && n.elementwise_rates ? s.rate_sums(k) : nullptr;
    N of_rate{}, of_options[2] = {};
    for (int64_t i = from; i < end; i += lanes<T>) {
      N before[Rule::states], after[Rule::states], cotangent[Rule::states], options[2];
      for (int j = 0; j < Rule::states; ++j) {
        before[j] = state_before(j, k, i), after[j] = conv::load(s.state(j, k + 1) + i);
        cotangent[j] = conv::load(s.cotangent(j) + i);
      }
      const N slope = rate_slope(rule, conv::load(here + i), conv::load(g + i),
                                 rate.vector(i), before, after, conv::load(s.lambda() + i),
                                 cotangent, options);
      if (each) conv::store(each + i, conv::load(each + i) + weight * slope);
      of_rate += slope, of_options[0] += options[0], of_options[1] += options[1];
    }
    if (n.learned_rates && !each) *s.rate_sum(k, l, tensor) += weight * total(of_rate);
    T* option = s.option_sums();
    for (int i = 0; i < 2; ++i) {
      if (n.rule.learns[i]) *option++ += weight * total(of_options[i]);
    }
  }

  // v <- clip (v - g <g, v> / c^2), where g was clipped to the norm c.
  void pull_back_clip(int k) const {
    T* const vector = s.vector();
    const T* const g = s.gradient(k);
    const T clip = s.clip(k), most = T(s.call.rule_options[kMaxNorm]);
    T along = 0;
    s.adapting([&](int, int, int64_t from, int64_t size) {
      along += dot(g + from, vector + from, size);
    });
    along = along / most / most;
    s.adapting([&](int, int, int64_t from, int64_t size) {
      for (int64_t j = from; j < from + size; ++j) vector[j] = clip * (vector[j] - along * g[j]);
    });
  }

  // The proximal term's part of the Hessian, and of the anchor. An entry of Adam or RMSprop whose
  // gradients have all been zero has not moved; there the two cancel, however large the vector is. With
  // decay it moves with theta_0; with a beta of zero the second moment forgets.
  void pull_back_prox(int k) const {
    T *const lambda = s.lambda(), *const vector = s.vector(), *const anchor = s.anchor();
    const T* const g = s.gradient(k);
    const T prox = T(n.prox);
    const bool rests = n.rule.kind != RuleKind::sgd && !n.rule.decays &&
                       s.call.rule_options[kSecondBeta] != 0;
    const T* const second = rests ? s.state(0, k + 1) : nullptr;
    s.adapting([&](int, int, int64_t from, int64_t size) {
      for (int64_t j = from; j < from + size; ++j) {
        if (second && second[j] == T(0) && g[j] == T(0)) continue;
        lambda[j] += prox * vector[j], anchor[j] += vector[j];
      }
    });
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
