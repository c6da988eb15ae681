// The activations: f, and either f' and f''/f' from f's value, or f, f' and f'' from its argument.
#pragma once

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class S>
struct Identity {
  static constexpr bool from_output = true, bent = false;
  template <class Num> FASTMETA_DEVICE Num value(Num z) const { return z; }
  template <class Num> FASTMETA_DEVICE Num slope(Num a) const { return a * S(0) + S(1); }
  template <class Num> FASTMETA_DEVICE Num bend(Num a) const { return a * S(0); }
};

// Where the argument is not a number the value is none either, as in torch.
template <class S>
struct Relu {
  static constexpr bool from_output = true, bent = false;
  template <class Num> FASTMETA_DEVICE Num value(Num z) const {
    return select(z <= S(0), Num{}, z);
  }
  template <class Num> FASTMETA_DEVICE Num slope(Num a) const {
    return select(a <= S(0), Num{}, Num{} + S(1));
  }
  template <class Num> FASTMETA_DEVICE Num bend(Num) const { return Num{}; }
};

template <class S>
struct LeakyRelu {
  static constexpr bool from_output = true, bent = false;
  S below;
  template <class Num> FASTMETA_DEVICE Num value(Num z) const {
    return select(z > S(0), z, z * below);
  }
  template <class Num> FASTMETA_DEVICE Num slope(Num a) const {
    return select(a > S(0), Num{} + S(1), Num{} + below);
  }
  template <class Num> FASTMETA_DEVICE Num bend(Num) const { return Num{}; }
};

template <class S>
struct Tanh {
  static constexpr bool from_output = true, bent = true;
  template <class Num> FASTMETA_DEVICE Num value(Num z) const { return tanh(z); }
  template <class Num> FASTMETA_DEVICE Num slope(Num a) const { return S(1) - a * a; }
  template <class Num> FASTMETA_DEVICE Num bend(Num a) const { return S(-2) * a; }
};

template <class S>
struct Sigmoid {
  static constexpr bool from_output = true, bent = true;
  template <class Num> FASTMETA_DEVICE Num value(Num z) const { return sigmoid(z); }
  template <class Num> FASTMETA_DEVICE Num slope(Num a) const { return a * (S(1) - a); }
  template <class Num> FASTMETA_DEVICE Num bend(Num a) const { return S(1) - S(2) * a; }
};

template <class S>
struct Elu {
  static constexpr bool from_output = true, bent = true;
  S alpha;
  template <class Num> FASTMETA_DEVICE Num value(Num z) const {
    return select(z > S(0), z, alpha * expm1(minimum(z, Num{})));
  }
  template <class Num> FASTMETA_DEVICE Num slope(Num a) const {
    return select(a > S(0), Num{} + S(1), a + alpha);
  }
  template <class Num> FASTMETA_DEVICE Num bend(Num a) const {
    return select(a > S(0), Num{}, Num{} + S(1));
  }
};

template <class S>
struct Softplus {
  static constexpr bool from_output = false, bent = true;
  S beta, threshold;
  template <class Num>
  FASTMETA_DEVICE void derivatives(Num z, Num& value, Num& slope, Num& curve) const {
    const Num t = z * beta, s = sigmoid(t);
    const auto linear = t > threshold;
    value = select(linear, z, softplus(t) / beta);
    slope = select(linear, Num{} + S(1), s);
    curve = select(linear, Num{}, beta * s * (S(1) - s));
  }
};

template <class S>
struct Silu {
  static constexpr bool from_output = false, bent = true;
  template <class Num>
  FASTMETA_DEVICE void derivatives(Num z, Num& value, Num& slope, Num& curve) const {
    const Num s = sigmoid(z), d = s * (S(1) - s);
    value = z * s;
    slope = s + z * d;
    curve = d * (S(2) + z * (S(1) - S(2) * s));
  }
};

// z times the normal distribution function.
template <class S>
struct Gelu {
  static constexpr bool from_output = false, bent = true;
  template <class Num>
  FASTMETA_DEVICE void derivatives(Num z, Num& value, Num& slope, Num& curve) const {
    const Num below = S(0.5) * (S(1) + erf(z * S(0.70710678118654752440)));
    const Num density = exp(S(-0.5) * z * z) * S(0.39894228040143267794);
    value = z * below;
    slope = below + z * density;
    curve = density * (S(2) - z * z);
  }
};

// The same with the distribution function replaced by (1 + tanh u) / 2, u a cubic in z.
template <class S>
struct GeluTanh {
  static constexpr bool from_output = false, bent = true;
  template <class Num>
  FASTMETA_DEVICE void derivatives(Num z, Num& value, Num& slope, Num& curve) const {
    const S scale = S(0.79788456080286535588), cubic = S(0.044715);
    const Num t = tanh(scale * (z + cubic * z * z * z));
    const Num u1 = scale * (S(1) + S(3) * cubic * z * z), u2 = scale * S(6) * cubic * z;
    const Num t1 = (S(1) - t * t) * u1, t2 = (S(1) - t * t) * u2 - S(2) * t * t1 * u1;
    value = S(0.5) * z * (S(1) + t);
    slope = S(0.5) * (S(1) + t + z * t1);
    curve = t1 + S(0.5) * z * t2;
  }
};

// An expression: a program computes its derivatives.
struct Traced {
  static constexpr bool from_output = false, bent = true;
};

// Calls `use` with the activation of a layer.
template <class S, class Use>
FASTMETA_DEVICE void with_activation(const Dense& layer, Use use) {
  switch (layer.activation) {
    case Activation::identity: return use(Identity<S>{});
    case Activation::relu: return use(Relu<S>{});
    case Activation::leaky_relu: return use(LeakyRelu<S>{S(layer.option)});
    case Activation::tanh: return use(Tanh<S>{});
    case Activation::sigmoid: return use(Sigmoid<S>{});
    case Activation::elu: return use(Elu<S>{S(layer.option)});
    case Activation::softplus: return use(Softplus<S>{S(layer.option), S(layer.second_option)});
    case Activation::silu: return use(Silu<S>{});
    case Activation::gelu: return use(Gelu<S>{});
    case Activation::gelu_tanh: return use(GeluTanh<S>{});
    case Activation::expression: return use(Traced{});
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
