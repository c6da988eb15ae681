// The product of the first layer in dual form: its weights are never made.
//
// Its input is data, so every weight it takes is W_k = W_0 - S_k' X and every cotangent of it is
// C_q' X_q + C_s' X, where S and C have a row for each example (docs/design.md, "The dual form").
// With the products with W_0 and the Gram matrices at hand, a step of it costs N^2 H, not N D H.
#pragma once

#include "network.h"
#include "views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class E>
class DualProduct {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  DualProduct(E& engine, const Dense& layer, const Layout::Dual& place)
      : e(engine), layer(layer), place(place) {}

  void start(View support, View query, View weight) {
    const auto keep = [](Num sum, Num& out) { out = sum; };
    const View w = transposed(weight);
    e.mm(keep, place.support, support, w);
    e.mm(keep, place.query, query, w);
    if (!layer.adapts[kWeight]) return;
    e.mm(keep, place.gram, support, transposed(support));
    e.mm(keep, place.cross, query, transposed(support));
  }
  void start_cotangent() {
    clear(place.of_query);
    clear(place.of_support);
    clear(place.pull);
  }

  // X W_k' + b of the support or the query set; b is the row `bias`, maybe null.
  void forward(bool of_query, int k, View out, const View* bias) {
    const View start = of_query ? place.query : place.support;
    const bool moved = k > 0 && layer.adapts[kWeight];
    if (moved && bias) {
      e.mm([](Num sum, Num& z, Num start, Num b) { z = start - sum + b; }, out, gram(of_query),
           place.steps[k], start, repeated(*bias, out.rows));
    } else if (moved) {
      e.mm([](Num sum, Num& z, Num start) { z = start - sum; }, out, gram(of_query),
           place.steps[k], start);
    } else if (bias) {
      e.map([](Num& z, Num start, Num b) { z = start + b; }, out, start,
            repeated(*bias, out.rows));
    } else {
      e.map([](Num& z, Num start) { z = start; }, out, start);
    }
  }

  // W_{k+1} = W_k - a delta' X.
  void descend(int k, S a, View delta) {
    if (k == 0) {
      e.map([a](Num& next, Num d) { next = a * d; }, place.steps[1], delta);
    } else {
      e.map([a](Num& next, Num s, Num d) { next = s + a * d; }, place.steps[k + 1], place.steps[k],
            delta);
    }
  }

  // lambda += w delta' X_q
  void add_query(S w, View delta) {
    e.map([w](Num& c, Num d) { c = c + w * d; }, place.of_query, delta);
    if (!layer.adapts[kWeight]) return;
    e.mm([w](Num sum, Num& out) { out = out + w * sum; }, place.pull, transposed(place.cross),
         delta);
  }

  // X lambda', which both the rate's gradient and the tangent of forward are made of.
  void find_along() {
    e.mm([](Num sum, Num& out, Num pull) { out = pull + sum; }, place.along, place.gram,
         place.of_support, place.pull);
  }
  void tangent_forward(S a, View out) {
    e.map([a](Num& r, Num along) { r = a * along; }, out, place.along);
  }
  // <lambda, delta' X>
  void rate_gradient(View out, View delta) { e.dot(out, place.along, delta); }

  // lambda -= r_delta' X
  void subtract_hessian(View r_delta) {
    e.map([](Num& c, Num d) { c = c - d; }, place.of_support, r_delta);
  }

  // lambda itself, in the place of the weight's gradient.
  void finish(View support, View query, View gradient) {
    e.mm2([](Num sum, Num& out) { out = sum; }, gradient, transposed(place.of_query), query,
          transposed(place.of_support), support);
  }

 private:
  E& e;
  const Dense& layer;
  const Layout::Dual& place;

  View gram(bool of_query) const { return of_query ? place.cross : place.gram; }
  void clear(View v) {
    e.map([](Num& out) { out = Num{}; }, v);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
