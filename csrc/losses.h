// The losses: value, derivative and tangent of the derivative, each a mean by example weights.
#pragma once

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// Losses of single numbers: value, first and second derivative by the prediction.
template <class S>
struct SquaredError {
  template <class Num> Num value(Num z, Num y) const { return (z - y) * (z - y); }
  template <class Num> Num slope(Num z, Num y) const { return S(2) * (z - y); }
  template <class Num> Num curve(Num, Num) const { return Num{} + S(2); }
};

template <class S>
struct BinaryCrossEntropy {
  template <class Num> Num value(Num z, Num y) const { return softplus(z) - z * y; }
  template <class Num> Num slope(Num z, Num y) const { return sigmoid(z) - y; }
  template <class Num> Num curve(Num z, Num) const {
    const Num s = sigmoid(z);
    return s * (S(1) - s);
  }
};

// Quadratic up to `knee`, then linear; times `scale`.
template <class S>
struct Huber {
  S knee, scale;
  template <class Num> Num value(Num z, Num y) const {
    const Num error = z - y, size = absolute(error);
    return scale * select(size < knee, S(0.5) * error * error, knee * (size - S(0.5) * knee));
  }
  template <class Num> Num slope(Num z, Num y) const {
    const Num error = z - y;
    return scale * select(error > knee, Num{} + knee, select(error < -knee, Num{} - knee, error));
  }
  template <class Num> Num curve(Num z, Num y) const {
    return select(absolute(z - y) < knee, Num{} + scale, Num{});
  }
};

template <class S>
struct AbsoluteError {
  template <class Num> Num value(Num z, Num y) const { return absolute(z - y); }
  template <class Num> Num slope(Num z, Num y) const {
    return select(z > y, Num{} + S(1), select(z < y, Num{} - S(1), z - y));
  }
  template <class Num> Num curve(Num, Num) const { return Num{}; }
};

template <class S, class Use>
void with_elementwise(const Loss& loss, Use use) {
  const S option = S(loss.option);
  switch (loss.kind) {
    case LossKind::cross_entropy: return;
    case LossKind::mse: return use(SquaredError<S>{});
    case LossKind::bce_with_logits: return use(BinaryCrossEntropy<S>{});
    case LossKind::huber: return use(Huber<S>{option, S(1)});
    case LossKind::smooth_l1: return use(Huber<S>{option, S(1) / option});
    case LossKind::l1: return use(AbsoluteError<S>{});
  }
}

// A column [N, 1] beside a matrix [N, C].
inline View beside(View column, View matrix) {
  return {column.offset, matrix.rows, matrix.cols, 1, 0};
}

// Leaves softmax in the place of the logits, and the weighted mean in `out`.
template <class E>
void softmax_loss(E& e, const Examples& set, View z, View out) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  e.fold_cols(set.row, [](Num& m, Num z) { m = maximum(m, z); }, S(-1) / S(0), z);
  e.map([](Num& z, Num m) { z = z - m; }, z, beside(set.row, z));
  e.fold_cols(set.second_row, [](Num& sum, Num z, Num y) { sum += z * y; }, S(0), z, set.targets);
  e.map([](Num& z) { z = exp(z); }, z);
  e.fold_cols(set.row, [](Num& sum, Num z) { sum += z; }, S(0), z);
  e.map([](Num& z, Num sum) { z = z / sum; }, z, beside(set.row, z));
  // Over the weights' sum, so that no example at all gives what torch gives, not a number.
  e.map([](Num& l, Num sum, Num w) { l = w * (log(sum) - l); }, set.second_row, set.row,
        set.weights);
  e.fold_rows(out, [](Num& sum, Num l) { sum += l; }, S(0), set.second_row);
  e.fold_rows(set.row, [](Num& sum, Num w) { sum += w; }, S(0), set.weights);
  e.map([](Num& l, Num sum) { l = l / sum; }, out, set.row);
}

// The loss of predictions `last.value`; leaves in their place what the other two rules need.
template <class E>
void loss_forward(E& e, const Loss& loss, const Examples& set, const Trace& last, View out) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const View z = last.value;
  if (loss.kind == LossKind::cross_entropy) return softmax_loss(e, set, z, out);
  const S share = S(1) / S(z.cols);
  with_elementwise<S>(loss, [&](auto l) {
    e.fold_cols(set.row, [l](Num& sum, Num z, Num y) { sum += l.value(z, y); }, S(0), z,
                set.targets);
  });
  e.fold_rows(out, [share](Num& sum, Num l, Num w) { sum += share * l * w; }, S(0), set.row,
              set.weights);
}

// Its derivative, into `last.delta`.
template <class E>
void loss_backward(E& e, const Loss& loss, const Examples& set, const Trace& last) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const View z = last.value, w = beside(set.weights, z);
  if (loss.kind == LossKind::cross_entropy) {
    e.map([](Num& d, Num p, Num y, Num w) { d = (p - y) * w; }, last.delta, z, set.targets, w);
    return;
  }
  const S share = S(1) / S(z.cols);
  with_elementwise<S>(loss, [&](auto l) {
    e.map([l, share](Num& d, Num z, Num y, Num w) { d = share * w * l.slope(z, y); }, last.delta,
          z, set.targets, w);
  });
}

// The derivative's tangent, into `out`, along the predictions' tangent `r`.
template <class E>
void loss_tangent(E& e, const Loss& loss, const Examples& set, const Trace& last, View r,
                  View out) {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  const View z = last.value, w = beside(set.weights, z);
  if (loss.kind == LossKind::cross_entropy) {
    e.fold_cols(set.row, [](Num& sum, Num p, Num r) { sum += p * r; }, S(0), z, r);
    e.map([](Num& d, Num p, Num r, Num mean, Num w) { d = w * p * (r - mean); }, out, z, r,
          beside(set.row, z), w);
    return;
  }
  const S share = S(1) / S(z.cols);
  with_elementwise<S>(loss, [&](auto l) {
    e.map([l, share](Num& d, Num z, Num y, Num r, Num w) { d = share * w * l.curve(z, y) * r; },
          out, z, set.targets, r, w);
  });
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
