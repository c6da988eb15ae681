// The product of the first layer in dual form: its weights are never made.
//
// Its input is data, so every weight it takes is W_k = W_0 - S_k' X and every cotangent of it is
// C_q' X_q + C_s' X, where S and C have a row for each example (docs/design.md, "The dual form").
// With the products with W_0 and the Gram matrices at hand, a step costs N^2 H, not N D H. Where each
// inner step has a support set of its own, S and C have a row for each of the R = K N examples of all
// steps; step k's rows are zero in S before it, and in C after it. A step then costs N R H / 2.
#pragma once

#include "epilogues.h"
#include "network.h"
#include "views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// The products that several tasks share, so that the weight is read once for all of them.
template <class E>
class TogetherDual {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;
  using Description = DescriptionIn<typename E::Place>;
  using Layout = LayoutIn<typename E::Place>;
  using Data = fastmeta::Data<S, typename E::Place>;

  FASTMETA_DEVICE TogetherDual(E& engine, const Description& network, const Layout& layout,
                               const Data& data, int tasks, bool loaded)
      : e(engine), network(network), place(layout.dual) {
    const int n = tasks * network.all_support(), q = tasks * network.query;
    support = e.inputs_together(layout.support.inputs, n, data.support_x);
    query = e.inputs_together(layout.query.inputs, q, data.query_x);
    if (!loaded) e.load(place.weight, data.parameters[kWeight]);
    const View w = transposed(place.weight);
    e.mm(Keep{}, part(place.support, n, 0), support, w);
    e.mm(Keep{}, part(place.query, q, 0), query, w);
  }

  // The weight's gradient, of cotangents that are weighted by task already.
  FASTMETA_DEVICE void finish() {
    if (!network.differentiate) return;
    const View sums = e.sums_like(place.gradient);
    if (sums.rows > 0) return find_gradient(Add<S>{S(1)}, sums);
    find_gradient(Keep{}, place.gradient);
    e.sum_tasks(0, place.gradient, Num{} + S(1));
  }

 private:
  E& e;
  const Description& network;
  const DualPlaceIn<typename E::Place>& place;
  View support, query;  // the inputs [G R, D], [G Q, D]

  template <class Use>
  FASTMETA_DEVICE void find_gradient(Use use, View out) {
    const View of_query = transposed(part(place.of_query, query.rows, 0));
    if (network.first_order) {  // then C_s is zero
      e.mm(use, out, of_query, query);
    } else {
      e.mm2(use, out, of_query, query, transposed(part(place.of_support, support.rows, 0)),
            support);
    }
  }
};

// One task's own part; `slot` is its number among those together.
template <class E>
class DualProduct {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;
  using Description = DescriptionIn<typename E::Place>;
  using DualPlace = DualPlaceIn<typename E::Place>;

  FASTMETA_DEVICE DualProduct(E& engine, const Description& network, const DualPlace& place,
                              int slot)
      : e(engine),
        layer(network.layers.front()),
        place(place),
        examples(network.support),
        apart(network.per_step_support),
        of_query(part(place.of_query, network.query, slot)),
        of_support(part(place.of_support, network.all_support(), slot)),
        support_start(part(place.support, network.all_support(), slot)),
        query_start(part(place.query, network.query, slot)) {}

  FASTMETA_DEVICE void find_grams(View support, View query) {
    if (!layer.adapts[kWeight]) return;
    e.mm(Keep{}, place.gram, support, transposed(support));
    e.mm(Keep{}, place.cross, query, transposed(support));
  }
  FASTMETA_DEVICE void start_cotangent() {
    clear(of_query);
    clear(of_support);
    clear(place.pull);
    if (place.buffer_cotangent.rows > 0) clear(place.buffer_cotangent);
  }

  // X W_k' + b of the support or the query set; b is the row `bias`, maybe null.
  FASTMETA_ONCE void forward(bool is_query, int k, View out, const View* bias) {
    View start = is_query ? query_start : at(support_start, k);
    if constexpr (E::takes_products) {
      if (is_query) e.load_query_product(start = out);
    }
    const bool moved = k > 0 && layer.adapts[kWeight];
    if (moved) {
      const View products = is_query ? place.cross : at(place.gram, k);
      e.mm(AddTo<S>{S(-1)}, out, transposed(before(transposed(products), k)),
           before(place.steps[k], k), start);
    } else if (start.offset != out.offset) {
      e.map([](Num& z, Num start) { z = start; }, out, start);
    }
    if (bias) e.map([](Num& z, Num b) { z = z + b; }, out, repeated(*bias, out.rows));
  }

  // W_{k+1} = W_k - a delta' X.
  FASTMETA_DEVICE void descend(int k, S a, View delta) {
    if (k == 0 || apart) {
      e.map([a](Num& next, Num d) { next = a * d; }, at(place.steps[k + 1], k), delta);
    } else {
      e.map([a](Num& next, Num s, Num d) { next = s + a * d; }, place.steps[k + 1], place.steps[k],
            delta);
    }
  }

  // The same by a rule that is linear in the gradient.
  template <class Rule>
  FASTMETA_ONCE void step(Rule rule, int k, S a, View delta) {
    if (k == 0) {
      clear(place.steps[0]);
      clear(place.buffer);
    }
    const auto update = [rule, a](Num& next, Num& buffer, Num s, Num d) {
      const Num before[] = {buffer};
      Num after[1];
      next = s + a * rule.step(d, before, after);
      buffer = after[0];
    };
    if (!apart) return e.map(update, place.steps[k + 1], place.buffer, place.steps[k], delta);
    // Rows of other steps get no gradient; the rows of step k are still zero, so they get that alone.
    e.map([update](Num& next, Num& buffer, Num s) { update(next, buffer, s, Num{}); },
          place.steps[k + 1], place.buffer, place.steps[k]);
    e.map([update](Num& next, Num& buffer, Num d) { update(next, buffer, Num{}, d); },
          at(place.steps[k + 1], k), at(place.buffer, k), delta);
  }

  // lambda += w delta' X_q
  FASTMETA_ONCE void add_query(S w, View delta) {
    e.map([w](Num& c, Num d) { c = c + w * d; }, of_query, delta);
    if (!layer.adapts[kWeight]) return;
    e.mm(Add<S>{w}, place.pull, transposed(place.cross), delta);
  }

  // lambda += delta' X, where the weight does not adapt.
  FASTMETA_DEVICE void add_support(View delta) {
    e.map([](Num& c, Num d) { c = c + d; }, of_support, delta);
  }

  // X lambda' at step k, which both the rate's gradient and the tangent of forward are made of. With
  // momentum it is needed for the rows of earlier steps too.
  FASTMETA_DEVICE void find_along(int k) {
    const bool all = place.buffer_cotangent.rows > 0;
    const auto of = [&](View v) { return all ? through(v, k) : at(v, k); };
    const View coefficients = after(of_support, k);
    if (coefficients.rows == 0) {
      e.map([](Num& along, Num pull) { along = pull; }, of(place.along), of(place.pull));
    } else {
      e.mm(AddTo<S>{S(1)}, of(place.along), transposed(after(transposed(of(place.gram)), k)),
           coefficients, of(place.pull));
    }
  }
  // From X lambda' to X v', v minus the gradient's cotangent.
  template <class Rule>
  FASTMETA_ONCE void pull_back(Rule rule, int k, S a) {
    find_along(k);
    e.map([rule, a](Num& v, Num& cotangent) {
            Num of_buffer[] = {cotangent};
            v = -rule.pull_back(Num{}, of_buffer, -a * v, of_buffer);
            cotangent = of_buffer[0];
          }, through(place.along, k), through(place.buffer_cotangent, k));
  }
  FASTMETA_DEVICE void tangent_forward(int k, S a, View out) {
    e.map([a](Num& r, Num along) { r = a * along; }, out, at(place.along, k));
  }
  // <lambda, delta' X>
  FASTMETA_DEVICE void rate_gradient(int k, View out, View delta) {
    e.dot(out, at(place.along, k), delta);
  }

  // lambda -= r_delta' X
  FASTMETA_DEVICE void subtract_hessian(int k, View r_delta) {
    e.map([](Num& c, Num d) { c = c - d; }, at(of_support, k), r_delta);
  }

  // Leaves the cotangents weighted by the task, for whoever makes the gradient of them.
  FASTMETA_ONCE void finish() {
    const Num weight = e.weight();
    e.map([weight](Num& c) { c = c * weight; }, of_query);
    e.map([weight](Num& c) { c = c * weight; }, of_support);
    if constexpr (E::takes_products) e.store_cotangents(place);
  }

 private:
  E& e;
  const Dense& layer;
  const DualPlace& place;
  const int examples;  // N
  const bool apart;    // whether each step has its own
  const View of_query, of_support, support_start, query_start;

  // Of a matrix with a row for each support example: the rows of step k, before it, up to and including
  // it, and after it; all rows where the steps share one set.
  FASTMETA_DEVICE View at(View v, int k) const { return apart ? part(v, examples, k) : v; }
  FASTMETA_DEVICE View before(View v, int k) const {
    return apart ? rows_from(v, 0, k * examples) : v;
  }
  FASTMETA_DEVICE View through(View v, int k) const { return before(v, k + 1); }
  FASTMETA_DEVICE View after(View v, int k) const {
    const int first = (k + 1) * examples;
    return apart ? rows_from(v, first, v.rows - first) : v;
  }
  FASTMETA_DEVICE void clear(View v) {
    e.map([](Num& out) { out = Num{}; }, v);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
