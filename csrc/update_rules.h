// The update rules of the inner loop, element by element: a step of each, and its pullback.
// Equations: docs/design.md, "Update rules".
//
// A rule is a struct of a step's coefficients, chosen outside the loop over elements. Its functions
// take any type that has select() and sqrt(): vectors of an engine, or scalars.
#pragma once

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// The coefficients of a rule at inner step k. A moment before the first step is zero.
template <class S>
struct RuleCoefficients {
  S momentum, gain;        // the buffer: b' = momentum b + gain g
  S of_gradient, of_buffer;  // the direction of SGD: of_gradient g + of_buffer b'
  S decay, shrink;         // weight decay into the gradient, and beside the direction
  S beta1, rest1, beta2, rest2;      // rest = 1 - beta
  S correction1, correction2;        // 1 / (1 - beta^(k + 1)), Adam's
  S log_slope1, log_slope2;          // d log correction / d beta
  S eps, eps_root;
};

// beta^(k + 1) and its derivative, and what Adam's bias correction makes of them.
FASTMETA_DEVICE static inline void find_correction(double beta, int k, double& correction,
                                                   double& log_slope) {
  double power = 1;
  for (int i = 0; i < k; ++i) power *= beta;
  correction = 1 / (1 - beta * power);
  log_slope = (k + 1) * power * correction;
}

// `options` are those of `RuleOption`, as Python gives them.
template <class S>
FASTMETA_DEVICE RuleCoefficients<S> rule_coefficients(const UpdateRule& rule,
                                                      const double* options, int k) {
  RuleCoefficients<S> at{};
  const bool begun = rule.momentum && k > 0;
  at.momentum = begun ? S(options[kMomentum]) : S(0);
  at.gain = begun && rule.kind == RuleKind::sgd ? S(1 - options[kDampening]) : S(1);
  at.of_gradient = rule.nesterov ? S(1) : S(0);
  at.of_buffer = rule.nesterov ? S(options[kMomentum]) : S(1);
  at.decay = rule.decays && !rule.decoupled ? S(options[kDecay]) : S(0);
  at.shrink = rule.decays && rule.decoupled ? S(options[kDecay]) : S(0);
  at.beta1 = S(options[kFirstBeta]), at.rest1 = S(1 - options[kFirstBeta]);
  at.beta2 = S(options[kSecondBeta]), at.rest2 = S(1 - options[kSecondBeta]);
  double correction, log_slope;
  find_correction(options[kFirstBeta], k, correction, log_slope);
  at.correction1 = S(correction), at.log_slope1 = S(log_slope);
  find_correction(options[kSecondBeta], k, correction, log_slope);
  at.correction2 = S(correction), at.log_slope2 = S(log_slope);
  at.eps = S(options[kEps]), at.eps_root = S(options[kEpsRoot]);
  return at;
}

// Each rule has
//   states      how many values of state an element has; of rules that have second moments these
//               are the first
//   step        the direction of a step along the gradient g, and the state after it
//   direction   the same direction, from the state after the step
//   pull_back   the gradient's cotangent; `along` is the direction's, and `cotangent` goes from the
//               state's after the step to the state's before
//   options     and, before `cotangent` is pulled back, the derivatives by the options `learnable`

// Stochastic gradient descent, with a momentum buffer. Without momentum the buffer is the gradient.
template <class S>
struct Sgd {
  static constexpr int states = 1;
  static constexpr RuleOption learnable[2] = {kMomentum, kRuleOptions};
  RuleCoefficients<S> at;

  template <class Num>
  FASTMETA_DEVICE Num step(Num g, const Num (&before)[states], Num (&after)[states]) const {
    after[0] = at.momentum * before[0] + at.gain * g;
    return direction(g, after);
  }
  template <class Num>
  FASTMETA_DEVICE Num direction(Num g, const Num (&after)[states]) const {
    return at.of_gradient * g + at.of_buffer * after[0];
  }
  template <class Num>
  FASTMETA_DEVICE Num pull_back(Num, const Num (&)[states], Num along,
                                Num (&cotangent)[states]) const {
    const Num of_after = cotangent[0] + at.of_buffer * along;
    cotangent[0] = at.momentum * of_after;
    return at.gain * of_after + at.of_gradient * along;
  }
  template <class Num>
  FASTMETA_DEVICE void options(Num, const Num (&before)[states], const Num (&after)[states],
                               Num along, const Num (&cotangent)[states], Num (&out)[2]) const {
    const Num of_after = cotangent[0] + at.of_buffer * along;
    out[0] = of_after * before[0] + at.of_gradient * along * after[0];
    out[1] = Num{};
  }
};

// Adam: Kingma and Ba 2015. Where the second moment is zero so is the direction, even with eps = 0,
// and the root has no slope there.
template <class S>
struct Adam {
  static constexpr int states = 2;  // second moment, first moment
  static constexpr RuleOption learnable[2] = {kFirstBeta, kSecondBeta};
  RuleCoefficients<S> at;

  template <class Num>
  FASTMETA_DEVICE Num step(Num g, const Num (&before)[states], Num (&after)[states]) const {
    after[0] = at.beta2 * before[0] + at.rest2 * g * g;
    after[1] = at.beta1 * before[1] + at.rest1 * g;
    return direction(g, after);
  }
  template <class Num>
  FASTMETA_DEVICE Num direction(Num, const Num (&after)[states]) const {
    const Num scale = root(after) + at.eps;
    return select(scale == S(0), Num{}, at.correction1 * after[1] / scale);
  }
  template <class Num>
  FASTMETA_DEVICE Num pull_back(Num g, const Num (&after)[states], Num along,
                                Num (&cotangent)[states]) const {
    Num inverse;
    const Num of_second = cotangent[0] + along_second(after, along, inverse);
    const Num of_first = cotangent[1] + at.correction1 * along * inverse;
    cotangent[0] = at.beta2 * of_second;
    cotangent[1] = at.beta1 * of_first;
    return at.rest1 * of_first + S(2) * at.rest2 * g * of_second;
  }
  template <class Num>
  FASTMETA_DEVICE void options(Num g, const Num (&before)[states], const Num (&after)[states],
                               Num along, const Num (&cotangent)[states], Num (&out)[2]) const {
    Num inverse;
    const Num part = along_second(after, along, inverse), of_second = cotangent[0] + part;
    const Num of_first = at.correction1 * along * inverse;
    out[0] = (cotangent[1] + of_first) * (before[1] - g) + at.log_slope1 * of_first * after[1];
    out[1] = of_second * (before[0] - g * g) + at.log_slope2 * part * after[0];
  }

 private:
  template <class Num>
  FASTMETA_DEVICE Num root(const Num (&after)[states]) const {
    return sqrt(at.correction2 * after[0] + at.eps_root);
  }
  // What the second moment's cotangent has of the direction's, and 1 / (root + eps). One division
  // serves both.
  template <class Num>
  FASTMETA_DEVICE Num along_second(const Num (&after)[states], Num along, Num& inverse) const {
    const Num s = root(after), scale = s + at.eps;
    const auto flat = s == S(0);
    const Num both = S(1) / select(flat, scale, s * scale);
    inverse = select(scale == S(0), Num{}, select(flat, both, s * both));
    const Num slope = S(-0.5) * at.correction1 * at.correction2 * after[1] * both * inverse;
    return select(flat, Num{}, along * slope);
  }
};

// RMSprop as torch has it, with a momentum buffer and maybe centered. Where the root is zero it has
// no slope, and the direction is zero even with eps = 0.
template <class S, bool centered>
struct RmsProp {
  static constexpr int states = centered ? 3 : 2;  // second moment, buffer, mean gradient
  static constexpr RuleOption learnable[2] = {kMomentum, kSecondBeta};
  RuleCoefficients<S> at;

  template <class Num>
  FASTMETA_DEVICE Num step(Num g, const Num (&before)[states], Num (&after)[states]) const {
    after[0] = at.beta2 * before[0] + at.rest2 * g * g;
    if constexpr (centered) after[2] = at.beta2 * before[2] + at.rest2 * g;
    const Num scale = root(after) + at.eps;
    after[1] = at.momentum * before[1] + select(scale == S(0), Num{}, g / scale);
    return after[1];
  }
  template <class Num>
  FASTMETA_DEVICE Num direction(Num, const Num (&after)[states]) const {
    return after[1];
  }
  template <class Num>
  FASTMETA_DEVICE Num pull_back(Num g, const Num (&after)[states], Num along,
                                Num (&cotangent)[states]) const {
    const Num of_buffer = cotangent[1] + along;
    Num inverse;
    const Num part = along_second(g, after, of_buffer, inverse), of_second = cotangent[0] + part;
    cotangent[0] = at.beta2 * of_second;
    cotangent[1] = at.momentum * of_buffer;
    Num gamma = of_buffer * inverse + S(2) * at.rest2 * g * of_second;
    if constexpr (centered) {
      const Num of_mean = cotangent[2] - S(2) * part * after[2];
      cotangent[2] = at.beta2 * of_mean;
      gamma = gamma + at.rest2 * of_mean;
    }
    return gamma;
  }
  template <class Num>
  FASTMETA_DEVICE void options(Num g, const Num (&before)[states], const Num (&after)[states],
                               Num along, const Num (&cotangent)[states], Num (&out)[2]) const {
    const Num of_buffer = cotangent[1] + along;
    Num inverse;
    const Num part = along_second(g, after, of_buffer, inverse);
    out[0] = of_buffer * before[1];
    out[1] = (cotangent[0] + part) * (before[0] - g * g);
    if constexpr (centered) {
      out[1] = out[1] + (cotangent[2] - S(2) * part * after[2]) * (before[2] - g);
    }
  }

 private:
  // Negative values left by rounding count as zero; NaN passes.
  template <class Num>
  FASTMETA_DEVICE Num root(const Num (&after)[states]) const {
    if constexpr (!centered) return sqrt(after[0]);
    const Num variance = after[0] - after[states - 1] * after[states - 1];
    return sqrt(select(variance < S(0), Num{}, variance));
  }
  template <class Num>
  FASTMETA_DEVICE Num along_second(Num g, const Num (&after)[states], Num of_buffer,
                                   Num& inverse) const {
    const Num s = root(after), scale = s + at.eps;
    const auto flat = s == S(0);
    const Num both = S(1) / select(flat, scale, s * scale);
    inverse = select(scale == S(0), Num{}, select(flat, both, s * both));
    return select(flat, Num{}, S(-0.5) * of_buffer * g * both * inverse);
  }
};

// Calls `use` with a rule's struct at inner step k.
template <class S, class Use>
FASTMETA_DEVICE void with_rule(const UpdateRule& rule, const double* options, int k, Use use) {
  const RuleCoefficients<S> at = rule_coefficients<S>(rule, options, k);
  switch (rule.kind) {
    case RuleKind::sgd: return use(Sgd<S>{at});
    case RuleKind::adam: return use(Adam<S>{at});
    case RuleKind::rmsprop:
      if (rule.centered) return use(RmsProp<S, true>{at});
      return use(RmsProp<S, false>{at});
  }
}

// The gradient as a rule sees it: g, already clipped, plus weight decay.
template <class S, class Num>
FASTMETA_DEVICE Num seen_gradient(const RuleCoefficients<S>& at, Num g, Num p) {
  return g + at.decay * p;
}

// The parameter p after a step at this rate along the clipped gradient g.
template <class Rule, class Num>
FASTMETA_DEVICE Num stepped(const Rule& rule, Num p, Num g, Num rate,
                            const Num (&before)[Rule::states], Num (&after)[Rule::states]) {
  const Num seen = seen_gradient(rule.at, g, p);
  return p - rate * (rule.step(seen, before, after) + rule.at.shrink * p);
}

// From the cotangents of parameter and state after a step to those before it, but for what goes
// through the gradient. Returns the cotangent of the clipped gradient g. Without decay p is
// not read.
template <class Rule, class Num>
FASTMETA_DEVICE Num pulled_back(const Rule& rule, Num p, Num g, Num rate,
                                const Num (&after)[Rule::states], Num& lambda,
                                Num (&cotangent)[Rule::states]) {
  const Num seen = seen_gradient(rule.at, g, p), along = -rate * lambda;
  const Num gamma = rule.pull_back(seen, after, along, cotangent);
  lambda = lambda + rule.at.shrink * along + rule.at.decay * gamma;
  return gamma;
}

// Before that: what an element adds to the gradients of its rate and of the options.
template <class Rule, class Num>
FASTMETA_DEVICE Num rate_slope(const Rule& rule, Num p, Num g, Num rate,
                               const Num (&before)[Rule::states], const Num (&after)[Rule::states],
                               Num lambda, const Num (&cotangent)[Rule::states], Num (&options)[2]) {
  const Num seen = seen_gradient(rule.at, g, p);
  rule.options(seen, before, after, -rate * lambda, cotangent, options);
  return -lambda * (rule.direction(seen, after) + rule.at.shrink * p);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
