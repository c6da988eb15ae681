// Batch norm between a layer's product and its activation: the four rules.
//
// Of the product u [N, H], with m the mean over the examples and s = (m((u - m(u))^2) + eps)^(-1/2):
//   forward              n = s (u - m(u)),  z = g n + b
//   backward             du = g s e,  e = dz - m(dz) - n m(n dz)
//   tangent of forward   n' = s (u' - m(u') - n m(n u')),  z' = g' n + g n' + b'
//   tangent of backward  du' = s ((g' - g q) e + g e'),  q = s m(n u'), because s' = -q s
//                        e' = dz' - m(dz') - n' m(n dz) - n m(n' dz + n dz')
// Where the statistics are given they are constants: every m is zero, and s does not move.
#pragma once

#include "epilogues.h"
#include "network.h"
#include "norm_views.h"
#include "views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class BatchNorm : NormViews {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  FASTMETA_DEVICE BatchNorm(E& engine, const Dense& layer, const LayerPlace& place, int rows)
      : NormViews{layer, place, rows}, e(engine), share(S(1) / S(rows)) {}

  // Normalises the product in its place, and leaves z in `t.value`.
  FASTMETA_DEVICE void forward(const Trace& t, const Blocks& at) {
    if (layer.norm == Norm::batch) find_statistics(t);
    e.map([](Num& z, Num& n, Num mean, Num s, Num g, Num b) { n = (n - mean) * s, z = g * n + b; },
          t.value, t.product, repeated(t.mean, rows), repeated(t.inverse, rows),
          scale(at.of[kScale]), shift(at.of[kShift]));
  }

  FASTMETA_DEVICE void backward(const Trace& t, const Blocks& at) {
    backward(t, at, t.delta, t.product_delta, t.sums);
  }

  // `r.value` from u' to z'.
  FASTMETA_DEVICE void tangent_forward(const Trace& t, const Tangent& r, const Blocks& at,
                                       int64_t v) {
    find_sums(t, r.value, r.value_sums);
    e.map(
        [share = share](Num& u, Num& rn, Num n, Num s, Num g, Num rg, Num rb, Num sum, Num along) {
          rn = s * (u - share * (sum + n * along));
          u = rg * n + g * rn + rb;
        },
        r.value, r.normalised, t.product, repeated(t.inverse, rows), scale(at.of[kScale]),
        tangent_scale(v), shift(v), moving(r.value_sums.plain), moving(r.value_sums.along));
  }

  // `r.delta` from dz' to du'; `moved`: tangent_forward found a tangent.
  FASTMETA_DEVICE void tangent_backward(const Trace& t, const Tangent& r, const Blocks& at,
                                        int64_t v, bool moved) {
    if (!moved) return backward(t, at, r.delta, r.delta, r.delta_sums);
    e.sum_rows(Keep{}, r.delta_sums.plain, r.delta);
    e.fold_rows(
        r.delta_sums.along,
        [](Num& sum, Num n, Num rd, Num rn, Num d) { sum += n * rd + rn * d; }, S(0), t.product,
        r.delta, r.normalised, t.delta);
    e.map(
        [share = share](Num& rd, Num d, Num n, Num rn, Num s, Num g, Num rg, Num sum, Num along,
                        Num rsum, Num ralong, Num stretch) {
          const Num centred = d - share * (sum + n * along);
          const Num moved = rd - share * (rsum + rn * along + n * ralong);
          rd = s * ((rg - g * s * share * stretch) * centred + g * moved);
        },
        r.delta, t.delta, t.product, r.normalised, repeated(t.inverse, rows),
        scale(at.of[kScale]), tangent_scale(v), moving(t.sums.plain), moving(t.sums.along),
        moving(r.delta_sums.plain), moving(r.delta_sums.along), moving(r.value_sums.along));
  }

 private:
  E& e;
  const S share;

  // Sums by which the statistics move.
  FASTMETA_DEVICE View moving(View sums) const {
    return layer.norm == Norm::batch ? repeated(sums, rows) : zero();
  }

  // The mean first: a variance by the sum of squares loses what the mean is larger by.
  FASTMETA_DEVICE void find_statistics(const Trace& t) {
    const S eps = S(layer.eps);
    e.sum_rows([share = share](Num sum, Num& mean) { mean = share * sum; }, t.mean, t.product);
    e.fold_rows(
        t.inverse, [](Num& sum, Num u, Num mean) { sum += (u - mean) * (u - mean); }, S(0),
        t.product, repeated(t.mean, rows));
    e.map([share = share, eps](Num& s) { s = S(1) / sqrt(share * s + eps); }, t.inverse);
  }

  FASTMETA_DEVICE void find_sums(const Trace& t, View derivative, const Sums& sums) {
    e.sum_rows(Keep{}, sums.plain, derivative);
    e.fold_rows(
        sums.along, [](Num& sum, Num n, Num d) { sum += n * d; }, S(0), t.product, derivative);
  }

  FASTMETA_DEVICE void backward(const Trace& t, const Blocks& at, View after, View before,
                                const Sums& sums) {
    find_sums(t, after, sums);
    e.map(
        [share = share](Num& du, Num dz, Num n, Num s, Num g, Num sum, Num along) {
          du = g * s * (dz - share * (sum + n * along));
        },
        before, after, t.product, repeated(t.inverse, rows), scale(at.of[kScale]),
        moving(sums.plain), moving(sums.along));
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
