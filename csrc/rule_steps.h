// A step of the inner loop by any update rule, and its pullback.
#pragma once

#include <utility>

#include "inner_steps.h"
#include "update_rules.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// One tensor under a rule at step k: where its matrices are.
template <class E>
struct RuledTensor {
  Step<E>& s;
  int k, l, tensor;
  using S = typename E::Scalar;

  FASTMETA_DEVICE View in(int64_t block) const { return s.layer(l).tensor(tensor, block); }
  FASTMETA_DEVICE View parameter() const { return in(s.theta(k)); }
  // The parameter where weight decay needs it, else zero: saves reading theta.
  FASTMETA_DEVICE View decayed() const {
    return s.network.rule.decays ? parameter() : throughout(s.layout.zero, parameter());
  }
  FASTMETA_DEVICE View gradient() const { return in(s.gradient(k)); }
  FASTMETA_DEVICE View before(int j) const {
    return k > 0 ? in(s.state(j, k)) : throughout(s.layout.zero, parameter());
  }
  FASTMETA_DEVICE View after(int j) const { return in(s.state(j, k + 1)); }
  FASTMETA_DEVICE View cotangent(int j) const { return in(s.layout.cotangents[j]); }
  // The rate is the sum of a number and a matrix, one of which is zero.
  FASTMETA_DEVICE S rate() const {
    return s.network.elementwise_rates ? S(0) : s.rate(k, l, tensor);
  }
  FASTMETA_DEVICE View rates() const {
    return s.network.elementwise_rates ? in(s.layout.rate) : throughout(s.layout.zero, parameter());
  }
};

// g_k, prox included. At step 0 theta_k is theta_0.
template <class E>
FASTMETA_ONCE void find_ruled_gradient(Step<E>& s, int k, int l, int tensor) {
  using S = typename E::Scalar;
  const Trace* trace = s.traces(s.layout.support, k);
  const View x = s.input(s.layout.support, trace, l);
  if (s.network.prox == 0 || k == 0) {
    find_gradient(s, tensor, Keep{}, l, x, trace[l], s.gradient(k));
  } else {
    const Move<S> keep{S(0), S(1), S(s.network.prox)};
    find_gradient(s, tensor, keep, l, x, trace[l], s.gradient(k), s.theta(k), s.theta(0));
  }
}

// layout.sum = <a, b> over what adapts
template <class E>
FASTMETA_ONCE void find_dot(Step<E>& s, int64_t a, int64_t b) {
  using Num = typename E::Num;
  s.clear(s.layout.sum);
  s.adapting([&](int l, int i) {
    s.e.dot(s.layout.scalar, s.layer(l).tensor(i, a), s.layer(l).tensor(i, b));
    s.e.map([](Num& sum, Num one) { sum = sum + one; }, s.layout.sum, s.layout.scalar);
  });
}

// g_k <- g_k min(1, c / |g_k|); the factor is kept for the pullback.
template <class E>
FASTMETA_DEVICE void clip_gradient(Step<E>& s, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const S most = S(s.data.rule_options[kMaxNorm]);
  find_dot(s, s.gradient(k), s.gradient(k));
  s.e.map([most](Num& clip, Num square) {
            const Num norm = sqrt(square);
            clip = select(norm > most, most / norm, Num{} + S(1));
          }, s.clip(k), s.layout.sum);
  s.adapting([&](int l, int i) {
    const View g = s.layer(l).tensor(i, s.gradient(k));
    s.e.map([](Num& g, Num clip) { g = clip * g; }, g, throughout(s.clip(k), g));
  });
}

template <class E, class Rule, int... j>
FASTMETA_ONCE void step_tensor(const RuledTensor<E>& t, const Rule& rule,
                               std::integer_sequence<int, j...>) {
  using Num = typename E::Num;
  const auto number = t.rate();
  const View to = t.in(t.s.theta(t.k + 1));
  t.s.e.map([FASTMETA_HELD(rule), number](
                Num& out, Num p, Num g, Num rate, auto&... states) {
              Num* const all[] = {&states...};
              const Num before[] = {*all[j]...};
              Num after[Rule::states];
              out = stepped(rule, p, g, number + rate, before, after);
              ((*all[Rule::states + j] = after[j]), ...);
            }, to, t.parameter(), t.gradient(), t.rates(), t.before(j)..., t.after(j)...);
}

// Whether the first layer's weight adapts in dual form.
template <class E>
FASTMETA_DEVICE bool dual_adapts(const Step<E>& s) {
  return s.network.dual && s.network.layers[0].adapts[kWeight];
}

template <class E>
FASTMETA_ONCE void step_by_rule(Step<E>& s, int k) {  // (1)
  const UpdateRule& rule = s.network.rule;
  const bool at_hand = s.in_chunks();
  if (rule.clips) {
    if (!at_hand) s.adapting([&](int l, int i) { find_ruled_gradient(s, k, l, i); });
    clip_gradient(s, k);
  }
  with_rule<typename E::Scalar>(rule, s.data.rule_options, k, [&](auto at) {
    s.adapting([&](int l, int i) {
      if (!rule.clips && !at_hand) find_ruled_gradient(s, k, l, i);
      step_tensor(RuledTensor<E>{s, k, l, i}, at,
                  std::make_integer_sequence<int, decltype(at)::states>());
    });
    if constexpr (decltype(at)::states == 1) {
      if (!dual_adapts(s)) return;
      const Trace* trace = s.traces(s.layout.support, k);
      s.dual().step(at, k, s.rate(k, 0, kWeight), trace[0].product_delta);
    }
  });
}

// The gradients of rate and options, from lambda and the state's cotangents after the step.
template <class E, class Rule, int... j>
FASTMETA_ONCE void add_rule_slopes(const RuledTensor<E>& t, const Rule& rule, int64_t place,
                                   std::integer_sequence<int, j...>) {
  using Num = typename E::Num;
  Step<E>& s = t.s;
  const auto number = t.rate();
  s.e.map([FASTMETA_HELD(rule), number](
              Num& of_rate, Num& first, Num& second, Num p, Num g, Num rate, Num lambda,
              auto&... states) {
            Num* const all[] = {&states...};
            const Num before[] = {*all[j]...}, after[] = {*all[Rule::states + j]...};
            const Num cotangent[] = {*all[2 * Rule::states + j]...};
            Num options[2];
            of_rate = rate_slope(rule, p, g, number + rate, before, after, lambda, cotangent,
                                 options);
            first = options[0], second = options[1];
          }, t.in(s.layout.slopes[0]), t.in(s.layout.slopes[1]), t.in(s.layout.slopes[2]),
          t.parameter(), t.gradient(), t.rates(), t.in(s.layout.lambda), t.before(j)...,
          t.after(j)..., t.cotangent(j)...);
  const auto add_sum = [&](int64_t to, int64_t slopes) {
    s.e.dot(s.layout.scalar, t.in(slopes), t.in(s.layout.ones));
    s.e.sum_tasks(to, s.layout.scalar, s.e.weight());
  };
  if (s.network.learned_rates && !s.network.elementwise_rates) {
    add_sum(s.layout.parameters + (t.k * s.depth + t.l) * kTensors + t.tensor, s.layout.slopes[0]);
  } else if (s.network.learned_rates) {
    s.e.sum_tasks(s.layout.parameters * (1 + t.k) + place, t.in(s.layout.slopes[0]), s.e.weight());
  }
  int64_t option = s.layout.parameters + rate_gradients(s.network, s.layout);
  for (int i = 0; i < 2; ++i) {
    if (s.network.rule.learns[i]) add_sum(option++, s.layout.slopes[1 + i]);
  }
}

// From lambda_{k+1} to lambda_k but for what goes through g_k, whose cotangent with the sign turned
// is left in the vector.
template <class E, class Rule, int... j>
FASTMETA_ONCE void pull_back_tensor(const RuledTensor<E>& t, const Rule& rule,
                                    std::integer_sequence<int, j...>) {
  using Num = typename E::Num;
  const auto number = t.rate();
  t.s.e.map([FASTMETA_HELD(rule), number](
                Num& v, Num p, Num g, Num rate, Num& lambda, auto&... states) {
              Num* const all[] = {&states...};
              const Num after[] = {*all[j]...};
              Num cotangent[] = {*all[Rule::states + j]...};
              v = -pulled_back(rule, p, g, number + rate, after, lambda, cotangent);
              ((*all[Rule::states + j] = cotangent[j]), ...);
            }, t.in(t.s.vector(t.k)), t.decayed(), t.gradient(), t.rates(),
            t.in(t.s.layout.lambda), t.after(j)..., t.cotangent(j)...);
}

// v <- clip (v - g <g, v> / c^2), where g was clipped to the norm c.
template <class E>
FASTMETA_DEVICE void pull_back_clip(Step<E>& s, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const S most = S(s.data.rule_options[kMaxNorm]);
  find_dot(s, s.gradient(k), s.vector(k));
  s.e.map([most](Num& sum, Num clip) {
            sum = select(clip < S(1), sum / most / most, Num{});
          }, s.layout.sum, s.clip(k));
  s.adapting([&](int l, int i) {
    const View v = s.layer(l).tensor(i, s.vector(k));
    s.e.map([](Num& v, Num g, Num clip, Num along) { v = clip * (v - g * along); }, v,
            s.layer(l).tensor(i, s.gradient(k)), throughout(s.clip(k), v),
            throughout(s.layout.sum, v));
  });
}

// The proximal term's part of the Hessian, and of the anchor. An entry of Adam or RMSprop whose
// gradients have all been zero has not moved; there the two cancel, however large v is. With decay it
// moves with theta_0, and with a beta of zero the second moment forgets. At step 0 they always cancel.
template <class E>
FASTMETA_DEVICE void pull_back_prox(Step<E>& s, int k) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  if (s.network.prox == 0 || k == 0) return;
  const S prox = S(s.network.prox);
  const UpdateRule& rule = s.network.rule;
  const bool rests = rule.kind != RuleKind::sgd && !rule.decays &&
                     s.data.rule_options[kSecondBeta] != 0;
  s.adapting([&](int l, int i) {
    const DenseLayer<E> at = s.layer(l);
    const View v = at.tensor(i, s.vector(k)), one = throughout(s.layout.one, v);
    s.e.map([prox](Num& l, Num& anchor, Num v, Num second, Num g) {
              const Num moves = absolute(second) + absolute(g);
              const Num pull = select(moves == S(0), Num{}, prox * v);
              l = l - pull, anchor = anchor + pull;
            }, at.tensor(i, s.layout.lambda), at.tensor(i, s.layout.anchor), v,
            rests ? at.tensor(i, s.state(0, k + 1)) : one,
            rests ? at.tensor(i, s.gradient(k)) : one);
  });
}

template <class E>
FASTMETA_ONCE void pull_back_rule(Step<E>& s, int k) {  // (3), and v of (4)
  const bool learns = learns_hyperparameters(s.network);
  with_rule<typename E::Scalar>(s.network.rule, s.data.rule_options, k, [&](auto rule) {
    const std::make_integer_sequence<int, decltype(rule)::states> states;
    int64_t place = 0;
    for (int l = 0; l < s.depth; ++l) {
      const Dense& d = s.network.layers[l];
      for (int i = 0; i < kTensors; ++i) {
        if (!d.has[i]) continue;
        const RuledTensor<E> at{s, k, l, i};
        if (d.adapts[i] && !s.is_dual(l, i)) {
          if (learns) add_rule_slopes(at, rule, place, states);
          pull_back_tensor(at, rule, states);
        } else if (l >= s.network.body && !s.is_dual(l, i)) {
          s.clear(at.in(s.vector(k)));
        }
        place += i == kWeight ? int64_t(d.in) * d.out : d.out;
      }
    }
    if constexpr (decltype(rule)::states == 1) {
      if (dual_adapts(s)) s.dual().pull_back(rule, k, s.rate(k, 0, kWeight));
    }
  });
  if (s.network.first_order) return;
  if (s.network.rule.clips) pull_back_clip(s, k);
  pull_back_prox(s, k);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
