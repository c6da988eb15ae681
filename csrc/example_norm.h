// Layer norm between a layer's product and its activation, also that by root mean square: the four rules.
//
// Of an example's product u [H], with m the mean over its entries and s = (m((u - m(u))^2) + eps)^(-1/2):
//   forward              n = s (u - m(u)),  z = g n + b
//   backward             du = s e,  e = d - m(d) - n m(n d),  d = g dz
//   tangent of forward   n' = s (u' - m(u') - n m(n u')),  z' = g' n + g n' + b'
//   tangent of backward  du' = s (e' - q e),  q = s m(n u'), because s' = -q s
//                        e' = d' - m(d') - n' m(n d) - n m(n' d + n d'),  d' = g' dz + g dz'
// By root mean square nothing is taken away: m(u), m(d), m(u') and m(d') are zero, and so is m(u) in s.
#pragma once

#include "epilogues.h"
#include "network.h"
#include "norm_views.h"
#include "views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class ExampleNorm : NormViews {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  FASTMETA_DEVICE ExampleNorm(E& engine, const Dense& layer, const LayerPlace& place, int rows)
      : NormViews{layer, place, rows}, e(engine), share(S(1) / S(layer.out)) {}

  // Normalises the product in its place, and leaves z in `t.value`.
  FASTMETA_DEVICE void forward(const Trace& t, const Blocks& at) {
    find_statistics(t);
    e.map([](Num& z, Num& n, Num mean, Num s, Num g, Num b) { n = (n - mean) * s, z = g * n + b; },
          t.value, t.product, centre(t.mean), beside(t.inverse, t.product), scale(at.of[kScale]),
          shift(at.of[kShift]));
  }

  FASTMETA_DEVICE void backward(const Trace& t, const Blocks& at) {
    backward(t, at, t.delta, t.product_delta, t.sums, t.of_rows);
  }

  // `r.value` from u' to z'.
  FASTMETA_DEVICE void tangent_forward(const Trace& t, const Tangent& r, const Blocks& at,
                                       int64_t v) {
    if (centres()) e.sum_cols(r.value_sums.plain, [](Num u) { return u; }, r.value);
    e.sum_cols(r.value_sums.along, [](Num n, Num u) { return n * u; }, t.product, r.value);
    e.map(
        [share = share](Num& u, Num& rn, Num n, Num s, Num g, Num rg, Num rb, Num sum, Num along) {
          rn = s * (u - share * (sum + n * along));
          u = rg * n + g * rn + rb;
        },
        r.value, r.normalised, t.product, beside(t.inverse, t.product), scale(at.of[kScale]),
        tangent_scale(v), shift(v), centre(r.value_sums.plain),
        beside(r.value_sums.along, t.product));
  }

  // `r.delta` from dz' to du'; `moved`: tangent_forward found a tangent.
  FASTMETA_DEVICE void tangent_backward(const Trace& t, const Tangent& r, const Blocks& at,
                                        int64_t v, bool moved) {
    if (!moved) return backward(t, at, r.delta, r.delta, r.delta_sums, r.of_rows);
    if (layer.has[kShift]) e.sum_rows(Keep{}, r.delta_sums.plain, r.delta);
    if (layer.has[kScale]) {
      e.fold_rows(
          r.delta_sums.along,
          [](Num& sum, Num n, Num rd, Num rn, Num d) { sum += n * rd + rn * d; }, S(0), t.product,
          r.delta, r.normalised, t.delta);
    }
    const View g = scale(at.of[kScale]), rg = tangent_scale(v);
    if (centres()) {
      e.sum_cols(r.of_rows.plain, [](Num rd, Num d, Num g, Num rg) { return rg * d + g * rd; },
                 r.delta, t.delta, g, rg);
    }
    e.sum_cols(
        r.of_rows.along,
        [](Num rd, Num d, Num n, Num rn, Num g, Num rg) {
          return rn * g * d + n * (rg * d + g * rd);
        },
        r.delta, t.delta, t.product, r.normalised, g, rg);
    e.map(
        [share = share](Num& rd, Num d, Num n, Num rn, Num s, Num g, Num rg, Num sum, Num along,
                        Num rsum, Num ralong, Num stretch) {
          const Num centred = g * d - share * (sum + n * along);
          const Num moved = rg * d + g * rd - share * (rsum + rn * along + n * ralong);
          rd = s * (moved - s * share * stretch * centred);
        },
        r.delta, t.delta, t.product, r.normalised, beside(t.inverse, t.product), g, rg,
        centre(t.of_rows.plain), beside(t.of_rows.along, t.product), centre(r.of_rows.plain),
        beside(r.of_rows.along, t.product), beside(r.value_sums.along, t.product));
  }

 private:
  E& e;
  const S share;

  FASTMETA_DEVICE bool centres() const { return layer.norm == Norm::layer; }
  // Sums that are taken away, as a matrix.
  FASTMETA_DEVICE View centre(View sums) const {
    return centres() ? View{sums.offset, rows, layer.out, sums.row_stride, 0}
                                     : zero();
  }

  // The mean first: a variance by the sum of squares loses what the mean is larger by.
  FASTMETA_DEVICE void find_statistics(const Trace& t) {
    const S eps = S(layer.eps);
    if (centres()) {
      e.sum_cols(t.mean, [](Num u) { return u; }, t.product);
      e.map([share = share](Num& mean) { mean = share * mean; }, t.mean);
    }
    e.sum_cols(t.inverse, [](Num u, Num mean) { return (u - mean) * (u - mean); }, t.product,
               centre(t.mean));
    e.map([share = share, eps](Num& s) { s = S(1) / sqrt(share * s + eps); }, t.inverse);
  }

  FASTMETA_DEVICE void find_sums(const Trace& t, View derivative, const Sums& sums) {
    if (layer.has[kShift]) e.sum_rows(Keep{}, sums.plain, derivative);
    if (!layer.has[kScale]) return;
    e.fold_rows(
        sums.along, [](Num& sum, Num n, Num d) { sum += n * d; }, S(0), t.product, derivative);
  }

  FASTMETA_DEVICE void backward(const Trace& t, const Blocks& at, View after, View before,
                                const Sums& sums, const Sums& of_rows) {
    find_sums(t, after, sums);
    const View g = scale(at.of[kScale]);
    if (centres()) e.sum_cols(of_rows.plain, [](Num d, Num g) { return g * d; }, after, g);
    e.sum_cols(of_rows.along, [](Num n, Num d, Num g) { return n * g * d; }, t.product, after, g);
    e.map(
        [share = share](Num& du, Num dz, Num n, Num s, Num g, Num sum, Num along) {
          du = s * (g * dz - share * (sum + n * along));
        },
        before, after, t.product, beside(t.inverse, t.product), g, centre(of_rows.plain),
        beside(of_rows.along, t.product));
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
