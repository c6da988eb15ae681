// A dense layer with its activation: the four rules.
#pragma once

#include "activations.h"
#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

inline View transposed(View v) { return {v.offset, v.cols, v.rows, v.col_stride, v.row_stride}; }

// One layer in one place; a block is an offset at which all parameters lie.
template <class E>
class DenseLayer {
 public:
  using S = typename E::Scalar;
  using Num = typename E::Num;

  DenseLayer(E& engine, const Dense& layer, const Layout::Layer& place)
      : e(engine), layer(layer), place(place) {}

  View weight(int64_t block) const {
    return {block + place.weight, layer.out, layer.in, place.weight_row_stride,
            place.weight_col_stride};
  }
  View bias(int64_t block) const { return {block + place.bias, 1, layer.out, layer.out, 1}; }
  // The bias as a row repeated over `rows` examples.
  View bias(int64_t block, int rows) const {
    return {block + place.bias, rows, layer.out, 0, 1};
  }

  // Forward: f(x W' + b). `w` and `b` are the blocks of weight and bias.
  void forward(View x, const Trace& t, int64_t w, int64_t b) {
    if (layer.bias) {
      e.mm([](Num sum, Num& z, Num b) { z = sum + b; }, t.value, x, transposed(weight(w)),
           bias(b, x.rows));
    } else {
      e.mm([](Num sum, Num& z) { z = sum; }, t.value, x, transposed(weight(w)));
    }
    if (layer.activation == Activation::identity) return;
    with_activation<S>(layer, [&](auto f) {
      if constexpr (f.from_output) {
        e.map([f](Num& z) { z = f.value(z); }, t.value);
      } else {
        e.map([f](Num& z, Num& slope, Num& curve) { f.derivatives(z, z, slope, curve); }, t.value,
              t.slope, t.curve);
      }
    });
  }

  // Backward through the activation: `t.delta` from after to before it.
  void backward(const Trace& t) {
    if (layer.activation == Activation::identity) return;
    with_activation<S>(layer, [&](auto f) {
      if constexpr (f.from_output) {
        e.map([f](Num& d, Num a) { d = d * f.slope(a); }, t.delta, t.value);
      } else {
        e.map([](Num& d, Num slope, Num& curve) { curve = curve * d, d = d * slope; }, t.delta,
              t.slope, t.curve);
      }
    });
  }

  // Backward to the input: dx = delta W.
  void backward_input(const Trace& t, View dx, int64_t w) {
    e.mm([](Num sum, Num& dx) { dx = sum; }, dx, t.delta, weight(w));
  }

  // Backward to the parameters: `use(sum, out, in...)` has their gradients.
  template <class Use, class... Blocks>
  void weight_gradient(Use use, const Trace& t, View x, int64_t out, Blocks... in) {
    e.mm(use, weight(out), transposed(t.delta), x, weight(in)...);
  }
  template <class Use, class... Blocks>
  void bias_gradient(Use use, const Trace& t, int64_t out, Blocks... in) {
    e.sum_rows(use, bias(out), t.delta, bias(in)...);
  }

  // Tangent of forward along the input's tangent `rx` (null: none) and the parameters' in block v.
  // Returns whether there is any.
  bool tangent_forward(View x, const View* rx, const Trace& t, const Tangent& r, int64_t w,
                       int64_t v) {
    const auto keep = [](Num sum, Num& z) { z = sum; };
    if (rx && layer.adapts_weight) {
      e.mm2(keep, r.value, *rx, transposed(weight(w)), x, transposed(weight(v)));
    } else if (rx) {
      e.mm(keep, r.value, *rx, transposed(weight(w)));
    } else if (layer.adapts_weight) {
      e.mm(keep, r.value, x, transposed(weight(v)));
    } else if (layer.adapts_bias) {
      e.map([](Num& z) { z = Num{}; }, r.value);
    } else {
      return false;
    }
    if (layer.adapts_bias) e.map([](Num& z, Num b) { z = z + b; }, r.value, bias(v, x.rows));
    if (layer.activation == Activation::identity) return true;
    with_activation<S>(layer, [&](auto f) {
      if constexpr (f.from_output && !f.bent) {
        e.map([f](Num& r, Num a) { r = r * f.slope(a); }, r.value, t.value);
      } else if constexpr (f.from_output) {
        e.map(
            [f](Num& r, Num& bend, Num a, Num d) {
              bend = f.bend(a) * d * r;
              r = r * f.slope(a);
            },
            r.value, r.bend, t.value, t.delta);
      } else {
        e.map([](Num& r, Num& bend, Num slope, Num curve) { bend = curve * r, r = r * slope; },
              r.value, r.bend, t.slope, t.curve);
      }
    });
    return true;
  }

  // Tangent of backward through the activation; `moved`: tangent_forward found a tangent.
  void tangent_backward(const Trace& t, const Tangent& r, bool moved) {
    if (layer.activation == Activation::identity) return;
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

  // Tangent of the input's derivative.
  void tangent_backward_input(const Trace& t, const Tangent& r, View out, int64_t w, int64_t v) {
    const auto keep = [](Num sum, Num& d) { d = sum; };
    if (layer.adapts_weight) {
      e.mm2(keep, out, r.delta, weight(w), t.delta, weight(v));
    } else {
      e.mm(keep, out, r.delta, weight(w));
    }
  }

  // Subtracts the tangent of the parameters' gradients from block `lambda`.
  void subtract_hessian(View x, const View* rx, const Trace& t, const Tangent& r, int64_t lambda) {
    const auto subtract = [](Num sum, Num& out) { out = out - sum; };
    if (rx) {
      e.mm2(subtract, weight(lambda), transposed(r.delta), x, transposed(t.delta), *rx);
    } else {
      e.mm(subtract, weight(lambda), transposed(r.delta), x);
    }
    if (layer.bias) e.sum_rows(subtract, bias(lambda), r.delta);
  }

 private:
  E& e;
  const Dense& layer;
  const Layout::Layer& place;
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
