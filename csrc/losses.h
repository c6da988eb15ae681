// The losses: value, derivative and tangent of the derivative, each a mean by example weights.
#pragma once

#include "expression.h"
#include "network.h"
#include "views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
using ExamplesOf = ExamplesIn<typename E::Place>;

// Elementwise losses: value, first and second derivative by the prediction.
// With factors a prediction's loss is c softplus(z) - z y: what weight= and pos_weight= come to.
template <class S>
struct SquaredError {
  template <class Num> FASTMETA_DEVICE Num value(Num z, Num y) const { return (z - y) * (z - y); }
  template <class Num> FASTMETA_DEVICE Num slope(Num z, Num y) const { return S(2) * (z - y); }
  template <class Num> FASTMETA_DEVICE Num curve(Num, Num) const { return Num{} + S(2); }
};

template <class S>
struct BinaryCrossEntropy {
  template <class Num> FASTMETA_DEVICE Num value(Num z, Num y) const { return softplus(z) - z * y; }
  template <class Num> FASTMETA_DEVICE Num slope(Num z, Num y) const { return sigmoid(z) - y; }
  template <class Num> FASTMETA_DEVICE Num curve(Num z, Num) const {
    const Num s = sigmoid(z);
    return s * (S(1) - s);
  }
  template <class Num> FASTMETA_DEVICE Num value(Num z, Num y, Num c) const {
    return c * softplus(z) - z * y;
  }
  template <class Num> FASTMETA_DEVICE Num slope(Num z, Num y, Num c) const {
    return c * sigmoid(z) - y;
  }
  template <class Num> FASTMETA_DEVICE Num curve(Num z, Num y, Num c) const {
    return c * curve(z, y);
  }
};

// Quadratic up to `knee`, then linear; times `scale`.
template <class S>
struct Huber {
  S knee, scale;
  template <class Num> FASTMETA_DEVICE Num value(Num z, Num y) const {
    const Num error = z - y, size = absolute(error);
    return scale * select(size < knee, S(0.5) * error * error, knee * (size - S(0.5) * knee));
  }
  template <class Num> FASTMETA_DEVICE Num slope(Num z, Num y) const {
    const Num error = z - y;
    return scale * select(error > knee, Num{} + knee, select(error < -knee, Num{} - knee, error));
  }
  template <class Num> FASTMETA_DEVICE Num curve(Num z, Num y) const {
    return select(absolute(z - y) < knee, Num{} + scale, Num{});
  }
};

template <class S>
struct AbsoluteError {
  template <class Num> FASTMETA_DEVICE Num value(Num z, Num y) const { return absolute(z - y); }
  template <class Num> FASTMETA_DEVICE Num slope(Num z, Num y) const {
    return select(z > y, Num{} + S(1), select(z < y, Num{} - S(1), z - y));
  }
  template <class Num> FASTMETA_DEVICE Num curve(Num, Num) const { return Num{}; }
};

// Calls `use` with the loss, and with the factors of the predictions where it has them.
template <class S, class Examples, class Use>
FASTMETA_DEVICE void with_elementwise(const Loss& loss, const Examples& set, Use use) {
  const S option = S(loss.option);
  switch (loss.kind) {
    case LossKind::cross_entropy: return;
    case LossKind::mse: return use(SquaredError<S>{});
    case LossKind::bce_with_logits:
      if (loss.weighted) return use(BinaryCrossEntropy<S>{}, set.loss_weights);
      return use(BinaryCrossEntropy<S>{});
    case LossKind::huber: return use(Huber<S>{option, S(1)});
    case LossKind::smooth_l1: return use(Huber<S>{option, S(1) / option});
    case LossKind::l1: return use(AbsoluteError<S>{});
    case LossKind::expression: return;  // computed by programs
  }
}

// What labels count for together: how many there are, or the sum of their classes' weights.
template <class E>
FASTMETA_DEVICE void find_mass(E& e, const Loss& loss, const ExamplesOf<E>& set) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  if (!loss.weighted) {
    return e.fold_rows(set.mass, [](Num& sum, Num w) { sum += w; }, S(0), set.weights);
  }
  const View classes = repeated(set.loss_weights, set.targets.rows);
  e.fold_cols(set.row, [](Num& sum, Num y, Num c) { sum += y * c; }, S(0), set.targets, classes);
  e.fold_rows(set.mass, [](Num& sum, Num c, Num w) { sum += c * w; }, S(0), set.row, set.weights);
}

// Rows of any sum become probabilities, and the sums go to the weights of the examples.
template <class E>
FASTMETA_DEVICE void normalise_targets(E& e, const ExamplesOf<E>& set) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  e.fold_cols(set.row, [](Num& sum, Num y) { sum += y; }, S(0), set.targets);
  e.map([](Num& y, Num sum) { y = select(sum == S(0), y, y / sum); }, set.targets,
        beside(set.row, set.targets));
  e.map([](Num& w, Num sum) { w = w * sum; }, set.weights, set.row);
}

// Labels or probabilities as rows of probabilities; every class's weight and the smoothing are in
// them and in the weights of the examples. Labels that are part of a set come with that set's mass.
template <class E>
FASTMETA_ONCE void load_targets(E& e, const Loss& loss, const ExamplesOf<E>& set,
                                  Global<const typename E::Scalar> targets,
                                  Global<const int64_t> labels,
                                  Global<const typename E::Scalar> loss_weights,
                                  Global<const typename E::Scalar> mass = {}) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  if (loss.weighted) e.load(set.loss_weights, loss_weights);
  if (labels.given()) {
    const S smoothing = loss.weighted ? S(0) : S(loss.option);
    e.load_labels(set.targets, set.weights, labels, loss.ignore_index, smoothing);
    mass.given() ? e.load(set.mass, mass) : find_mass(e, loss, set);
    e.map([](Num& w, Num mass) { w = select(w == S(0), w, w / mass); }, set.weights,
          throughout(set.mass, set.weights));
    if (!loss.weighted) return;
  } else {
    e.load(set.targets, targets);
    e.map([](Num& m) { m = Num{} + S(1); }, set.mass);
    if (loss.kind != LossKind::cross_entropy) return;
  }
  const S kept = S(1) - S(loss.option), rest = S(loss.option) / S(set.targets.cols);
  e.map([kept, rest](Num& y) { y = kept * y + rest; }, set.targets);
  if (loss.weighted) {
    e.map([](Num& y, Num c) { y = y * c; }, set.targets,
          repeated(set.loss_weights, set.targets.rows));
  }
  normalise_targets(e, set);
}

// Leaves softmax in `p`, and the weighted mean in `out`.
template <class E>
FASTMETA_DEVICE void softmax_loss(E& e, const ExamplesOf<E>& set, View z, View p, View out) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  e.fold_cols(set.row, [](Num& m, Num z) { m = maximum(m, z); }, S(-1) / S(0), z);
  e.map([](Num& p, Num z, Num m) { p = z - m; }, p, z, beside(set.row, z));
  e.fold_cols(set.second_row, [](Num& sum, Num z, Num y) { sum += z * y; }, S(0), p, set.targets);
  e.map([](Num& z) { z = exp(z); }, p);
  e.fold_cols(set.row, [](Num& sum, Num z) { sum += z; }, S(0), p);
  e.map([](Num& z, Num sum) { z = z / sum; }, p, beside(set.row, p));
  e.map([](Num& l, Num sum, Num w) { l = w * (log(sum) - l); }, set.second_row, set.row,
        set.weights);
  e.fold_rows(out, [](Num& sum, Num l) { sum += l; }, S(0), set.second_row);
  // Torch's mean of nothing is no number, its derivatives are zero.
  e.map([](Num& l, Num mass) { l = l + (mass - mass) / mass; }, out, set.mass);
}

// Runs a program of a loss that is an expression; what it learns gets its gradient in the set's own.
template <class E>
FASTMETA_ONCE void run_loss(E& e, const Loss& loss, const Program& program, const ExamplesOf<E>& set,
                            const Trace& last, View direction, View value, View result) {
  View matrices[kLossInputs + 2 * kMostLossInputs] = {last.value, direction, set.weights, value,
                                                      result};
  int learned = 0, next = kLossInputs;
  for (const LossInput& input : loss.programs->inputs) {
    matrices[next] = set.loss_inputs[(next - kLossInputs) / 2];
    if (input.learns) matrices[next + 1] = set.gradients[learned++];
    next += 2;
  }
  e.evaluate(program, last.value.rows, matrices);
}

// The gradients of a loss by what it learns, times a factor, to their sums.
template <class E>
FASTMETA_ONCE void add_captured(E& e, const ExamplesOf<E>& set, typename E::Scalar factor) {
  using Num = typename E::Num;
  for (std::size_t i = 0; i < std::size_t(set.sums.size()); ++i) {
    e.map([factor](Num& sum, Num g) { sum = sum + factor * g; }, set.sums[i], set.gradients[i]);
  }
}

// The loss of predictions `last.value`; `backward`: loss_backward follows.
template <class E>
FASTMETA_ONCE void loss_forward(E& e, const Loss& loss, const ExamplesOf<E>& set,
                                  const Trace& last, View out, bool backward) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const View z = last.value;
  if constexpr (E::takes_programs) {
    if (const LossPrograms* of = loss.programs) {
      return run_loss(e, loss, backward ? of->gradient : of->value, set, last, {}, out, last.delta);
    }
  }
  if (loss.kind == LossKind::cross_entropy) return softmax_loss(e, set, z, last.softmax, out);
  const S share = S(1) / S(z.cols);
  with_elementwise<S>(loss, set, [&](auto l, auto... factors) {
    e.fold_cols(set.row, [l](Num& sum, Num z, Num y, auto... c) { sum += l.value(z, y, c...); },
                S(0), z, set.targets, factors...);
  });
  e.fold_rows(out, [share](Num& sum, Num l, Num w) { sum += share * l * w; }, S(0), set.row,
              set.weights);
}

// Its derivative, into `last.delta`.
template <class E>
FASTMETA_ONCE void loss_backward(E& e, const Loss& loss, const ExamplesOf<E>& set,
                                   const Trace& last) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const View z = last.value, w = beside(set.weights, z);
  if constexpr (E::takes_programs) {
    if (loss.programs) return;  // with the loss
  }
  if (loss.kind == LossKind::cross_entropy) {
    e.map([](Num& d, Num p, Num y, Num w) { d = (p - y) * w; }, last.delta, last.softmax,
          set.targets, w);
    return;
  }
  const S share = S(1) / S(z.cols);
  with_elementwise<S>(loss, set, [&](auto l, auto... factors) {
    e.map([l, share](Num& d, Num z, Num y, Num w,
                     auto... c) { d = share * w * l.slope(z, y, c...); },
          last.delta, z, set.targets, w, factors...);
  });
}

// The derivative's tangent, into `out`, along the predictions' tangent `r`.
template <class E>
FASTMETA_ONCE void loss_tangent(E& e, const Loss& loss, const ExamplesOf<E>& set,
                                  const Trace& last, View r, View out) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const View z = last.value, w = beside(set.weights, z);
  if constexpr (E::takes_programs) {
    if (loss.programs) return run_loss(e, loss, loss.programs->tangent, set, last, r, {}, out);
  }
  if (loss.kind == LossKind::cross_entropy) {
    const View p = last.softmax;
    e.fold_cols(set.row, [](Num& sum, Num p, Num r) { sum += p * r; }, S(0), p, r);
    e.map([](Num& d, Num p, Num r, Num mean, Num w) { d = w * p * (r - mean); }, out, p, r,
          beside(set.row, p), w);
    return;
  }
  const S share = S(1) / S(z.cols);
  with_elementwise<S>(loss, set, [&](auto l, auto... factors) {
    e.map([l, share](Num& d, Num z, Num y, Num r, Num w,
                     auto... c) { d = share * w * l.curve(z, y, c...) * r; },
          out, z, set.targets, r, w, factors...);
  });
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
