// A dense layer: product, sum, norm, activation, of which it has what it has; the four rules.
#pragma once

#include <type_traits>

#include "activations.h"
#include "batch_norm.h"
#include "epilogues.h"
#include "example_norm.h"
#include "network.h"
#include "views.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// One layer in one place; a block is an offset at which all parameters lie.
template <class E>
class DenseLayer {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  FASTMETA_DEVICE DenseLayer(E& engine, const Dense& layer, const LayerPlace& place)
      : e(engine), layer(layer), place(place) {}

  FASTMETA_DEVICE View weight(int64_t block) const {
    return {block + place.of[kWeight], layer.out, layer.in, place.weight_row_stride,
            place.weight_col_stride};
  }
  FASTMETA_DEVICE View row(int tensor, int64_t block) const {
    return {block + place.of[tensor], 1, layer.out, layer.out, 1};
  }
  FASTMETA_DEVICE View tensor(int tensor, int64_t block) const {
    return tensor == kWeight ? weight(block) : row(tensor, block);
  }

  // Forward: f(norm(x W' + b + plus)).
  FASTMETA_ONCE void forward(View x, const Trace& t, const View* plus, const Blocks& at) {
    const View w = transposed(weight(at.of[kWeight]));
    if (!layer.has[kWeight]) {
      pass(Keep{}, t, t.product, x, false);
    } else if (layer.has[kBias]) {
      e.mm(AddTo<S>{S(1)}, t.product, x, w, repeated(row(kBias, at.of[kBias]), x.rows));
    } else {
      e.mm(Keep{}, t.product, x, w);
    }
    if (plus) pass(Add<S>{1}, t, t.product, *plus, true);
    after_product(t, at);
  }

  FASTMETA_ONCE void after_product(const Trace& t, const Blocks& at) {
    with_norm(t, [&](auto norm) { norm.forward(t, at); });
    if (layer.activation != Activation::identity) activate(t);
  }

  // Backward through activation and norm: `t.delta` from after to before the activation, from
  // there to `t.product_delta`.
  FASTMETA_ONCE void backward(const Trace& t, const Blocks& at) {
    if (layer.activation != Activation::identity) {
      with_activation<S>(layer, [&](auto f) {
        if constexpr (f.from_output) {
          e.map([f](Num& d, Num a) { d = d * f.slope(a); }, t.delta, t.value);
        } else if (t.curve.rows > 0) {
          e.map([](Num& d, Num slope, Num& curve) { curve = curve * d, d = d * slope; }, t.delta,
                t.slope, t.curve);
        } else {
          e.map([](Num& d, Num slope) { d = d * slope; }, t.delta, t.slope);
        }
      });
    }
    with_norm(t, [&](auto norm) { norm.backward(t, at); });
  }

  // Backward to the input, or to what is added: `use(sum, out)` has delta W, or delta.
  template <class Use>
  FASTMETA_ONCE void backward_input(Use use, const Trace& t, View out, const Blocks& at,
                                    bool is_plus) {
    if (is_plus || !layer.has[kWeight]) return pass(use, t, out, t.product_delta, is_plus);
    e.mm(use, out, t.product_delta, weight(at.of[kWeight]));
  }

  // Backward to the parameters: `use(sum, out, in...)` has their gradients.
  template <class Use, class... Offsets>
  FASTMETA_ONCE void weight_gradient(Use use, const Trace& t, View x, int64_t out,
                                       Offsets... in) {
    e.mm(use, weight(out), transposed(t.product_delta), x, weight(in)...);
  }
  template <class Use, class... Offsets>
  FASTMETA_ONCE void row_gradient(int tensor, Use use, const Trace& t, int64_t out,
                                    Offsets... in) {
    if (tensor == kBias) {
      e.sum_rows(use, row(tensor, out), t.product_delta, row(tensor, in)...);
    } else {  // sums that the norm's own rules need
      e.map([use](Num& out, Num sum, auto... in) { use(sum, out, in...); }, row(tensor, out),
            tensor == kScale ? t.sums.along : t.sums.plain, row(tensor, in)...);
    }
  }

  // Tangent of forward along the input's tangent `rx` (null: none) and the parameters' in block v:
  // of the product, into `r.value`, whether there is any; and from there, where the layer moves.
  FASTMETA_ONCE bool tangent_product(View x, const View* rx, const Trace& t, const Tangent& r,
                                     const Blocks& at, int64_t v) {
    const View w = transposed(weight(at.of[kWeight]));
    if (!layer.has[kWeight]) {
      if (rx) pass(Keep{}, t, r.value, *rx, false);
      return rx != nullptr;
    }
    if (rx && layer.adapts[kWeight]) {
      e.mm2(Keep{}, r.value, *rx, w, x, transposed(weight(v)));
    } else if (rx) {
      e.mm(Keep{}, r.value, *rx, w);
    } else if (layer.adapts[kWeight]) {
      e.mm(Keep{}, r.value, x, transposed(weight(v)));
    } else {
      return false;
    }
    return true;
  }
  FASTMETA_ONCE void tangent_forward(bool moved, const Trace& t, const View* rplus,
                                     const Tangent& r, const Blocks& at, int64_t v) {
    if (!moved) e.map([](Num& z) { z = Num{}; }, r.value);
    if (rplus) pass(Add<S>{1}, t, r.value, *rplus, true);
    if (layer.adapts[kBias]) {
      e.map([](Num& z, Num b) { z = z + b; }, r.value, repeated(row(kBias, v), r.value.rows));
    }
    with_norm(t, [&](auto norm) { norm.tangent_forward(t, r, at, v); });
    if (layer.activation != Activation::identity) tangent_activate(t, r);
  }

  // Tangent of backward through activation and norm; `moved`: tangent_forward found a tangent.
  FASTMETA_ONCE void tangent_backward(const Trace& t, const Tangent& r, const Blocks& at,
                                        int64_t v, bool moved) {
    if (layer.activation != Activation::identity) {
      with_activation<S>(layer, [&](auto f) {
        if constexpr (f.from_output) {
          e.map([f](Num& d, Num a) { d = d * f.slope(a); }, r.delta, t.value);
        } else {
          e.map([](Num& d, Num slope) { d = d * slope; }, r.delta, t.slope);
        }
        if constexpr (f.bent) {
          if (moved) e.map([](Num& d, Num bend) { d = d + bend; }, r.delta, r.bend);
        }
      });
    }
    with_norm(t, [&](auto norm) { norm.tangent_backward(t, r, at, v, moved); });
  }

  // Tangent of the input's derivative, for `use(sum, out)`.
  template <class Use>
  FASTMETA_ONCE void tangent_backward_input(Use use, const Trace& t, const Tangent& r, View out,
                                              const Blocks& at, int64_t v, bool is_plus) {
    if (is_plus || !layer.has[kWeight]) {
      pass(use, t, out, r.delta, is_plus);
    } else if (layer.adapts[kWeight]) {
      e.mm2(use, out, r.delta, weight(at.of[kWeight]), t.product_delta, weight(v));
    } else {
      e.mm(use, out, r.delta, weight(at.of[kWeight]));
    }
  }

  // Add the tangent of the parameters' gradients, times the factor, to block `out`.
  FASTMETA_ONCE void add_hessian_of_weight(Add<S> add, View x, const View* rx, const Trace& t,
                                           const Tangent& r, int64_t out) {
    if (rx) {
      e.mm2(add, weight(out), transposed(r.delta), x, transposed(t.product_delta), *rx);
    } else {
      e.mm(add, weight(out), transposed(r.delta), x);
    }
  }
  FASTMETA_ONCE void add_hessian_of_rows(Add<S> add, const Tangent& r, int64_t out) {
    if (layer.has[kBias]) e.sum_rows(add, row(kBias, out), r.delta);
    const auto add_found = [add](Num& out, Num sum) { add(sum, out); };
    if (layer.has[kScale]) e.map(add_found, row(kScale, out), r.delta_sums.along);
    if (layer.has[kShift]) e.map(add_found, row(kShift, out), r.delta_sums.plain);
  }

 private:
  E& e;
  const Dense& layer;
  const LayerPlace& place;

  // Calls `use` with the layer's norm, if there is one.
  template <class Use>
  FASTMETA_DEVICE void with_norm(const Trace& t, Use use) {
    if (layer.norm == Norm::none) return;
    if (!is_of_examples(layer.norm)) {
      use(BatchNorm<E>(e, layer, place, t.product.rows));
    } else if constexpr (E::takes_graphs) {
      use(ExampleNorm<E>(e, layer, place, t.product.rows));
    }
  }

  // What goes through beside a product, either way: what is added, or what stands for it.
  template <class Use>
  FASTMETA_DEVICE void pass(Use use, const Trace& t, View out, View in, bool is_plus) {
    if constexpr (E::takes_graphs) {
      if (layer.masked && !is_plus) {
        e.map([use](Num& out, Num in, Num mask) { use(in * mask, out); }, out, in, t.mask);
      } else {
        e.map([use](Num& out, Num in) { use(in, out); }, out, in);
      }
    }
  }

  // Of a layer without a norm the product lies where `t.value` does; a norm leaves z there.
  FASTMETA_DEVICE void activate(const Trace& t) {
    with_activation<S>(layer, [&](auto f) {
      if constexpr (std::is_same_v<decltype(f), Traced>) {
        if constexpr (E::takes_programs) evaluate(t);
      } else if constexpr (f.from_output) {
        e.map([f](Num& a) { a = f.value(a); }, t.value);
      } else if (t.curve.rows > 0) {
        e.map([f](Num& a, Num& slope, Num& curve) { f.derivatives(a, a, slope, curve); },
              t.value, t.slope, t.curve);
      } else {
        e.map([f](Num& a, Num& slope) {
                Num curve;
                f.derivatives(a, a, slope, curve);
              }, t.value, t.slope);
      }
    });
  }

  // By an expression's program, on all the numbers in a row.
  FASTMETA_DEVICE void evaluate(const Trace& t) {
    const int count = t.value.rows * t.value.row_stride;
    const auto flat = [count](View v) { return View{v.offset, count, 1, 1, 1}; };
    const View matrices[] = {flat(t.value), flat(t.value), flat(t.slope), flat(t.curve)};
    e.evaluate(t.curve.rows > 0 ? *layer.program : *layer.short_program, count, matrices);
  }

  // Its tangent along rz in `r.value`, in the same place.
  FASTMETA_DEVICE void tangent_activate(const Trace& t, const Tangent& r) {
    with_activation<S>(layer, [&](auto f) {
      if constexpr (f.from_output && !f.bent) {
        e.map([f](Num& r, Num a) { r = r * f.slope(a); }, r.value, t.value);
      } else if constexpr (f.from_output) {
        e.map([f](Num& r, Num& bend, Num a, Num d) { bend = f.bend(a) * d * r, r = r * f.slope(a); },
              r.value, r.bend, t.value, t.delta);
      } else {
        e.map([](Num& r, Num& bend, Num slope, Num curve) { bend = curve * r, r = r * slope; },
              r.value, r.bend, t.slope, t.curve);
      }
    });
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
