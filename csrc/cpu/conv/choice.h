// Passes over windows whose greatest pixels are kept as codes.
#pragma once

#include "expressed.h"
#include "windows.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T>
struct Choice {
  using N = Num<T>;
  static constexpr int lanes = conv::lanes<T>;
  static constexpr bool everywhere = false;
  const Field& field;
  T below;
  N place{}, slope{};
  void read(const T* code) {
    const N given = load(code);
    slope = select(given < N{}, all(below), all(T(1)));
    place = place_of(code);
  }
  // use(index, place in the field) for each pixel of a window
  template <int W, class Use>
  void each(Use use) const {
    const int height = W ? W : field.window[0], width = W ? W : field.window[1];
    int index = 0;
#pragma GCC unroll 2
    for (int i = 0; i < height; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < width; ++j, ++index) {
        use(index, (int64_t(i) * field.cols + j) * field.channels);
      }
    }
  }
  void begin(int) {}
  void end(int) {}
  void pixel(int64_t) {}
  template <int W>
  void ahead(int64_t, int64_t) const {}
};

// value and code from the scaled product; `constant` [channels] is what that lacks.
template <class T>
struct Choose : Choice<T> {
  const T *product, *constant;
  T *value, *code;
  Num<T> shift{};
  void begin(int c) { shift = load(constant + c); }
  template <int W>
  void window(int64_t in, int64_t out) {
    Num<T> best = load(product + in), place{};
    this->template each<W>([&](int index, int64_t at) {
      if (index == 0) return;
      const Num<T> one = load(product + in + at);
      // What is not a number wins, as in torch.
      const auto more = (one > best) | (one != one);
      best = select(more, one, best), place = select(more, all(T(index)), place);
    });
    best += shift;
    const Num<T> low = this->below == T(0) ? Num<T>{} : best * this->below;
    store(value + out, select(best < Num<T>{}, low, best));
    store(code + out, select(best > Num<T>{}, place, T(-1) - place));
  }
};

// The tangent of value from that of the scaled product.
template <class T>
struct TangentOfChoice : Choice<T> {
  const T *product, *constant, *code;
  T* value;
  Num<T> shift{};
  void begin(int c) { shift = load(constant + c); }
  template <int W>
  void window(int64_t in, int64_t out) {
    this->read(code + out);
    Num<T> found = load(product + in);
    this->template each<W>([&](int index, int64_t at) {
      if (index == 0) return;
      found = select(this->place == all(T(index)), load(product + in + at), found);
    });
    store(value + out, this->slope * (found + shift));
  }
};

// value and code of the pixels where the block's expression of z is greatest; z, and place for its
// value, are offsets.
template <class T>
void choose(const fastmeta::conv::Block& b, const Shape& shape, const Field& f, int64_t examples,
            T* workspace, int64_t z, int64_t choices, const T* zeros, T* value, T* code) {
  const int64_t offsets[] = {z, choices};
  express(*b.choice, workspace, offsets, examples * f.rows * f.cols * f.channels, shape, b.filters);
  run_pass(f, 0, examples, Choose<T>{{f, T(1)}, workspace + choices, zeros, value, code});
  run_pass(f, 0, examples, TangentOfChoice<T>{{f, T(1)}, workspace + z, zeros, code, value});
}

// result: the derivative by what the activation takes, at the greatest, and zeros elsewhere; sums
// += that over the pixels.
template <class T>
struct Scatter : Choice<T> {
  static constexpr bool everywhere = true;
  const T *code, *delta;
  T *result, *sums;
  Num<T> sum{};
  void begin(int) { sum = Num<T>{}; }
  template <int W>
  void window(int64_t in, int64_t out) {
    this->read(code + out);
    const Num<T> dz = this->slope * load(delta + out);
    sum += dz;
    this->template each<W>([&](int index, int64_t at) {
      store(result + in + at, W == 1 ? dz : select(this->place == all(T(index)), dz, Num<T>{}));
    });
  }
  template <int W>
  void ahead(int64_t, int64_t out) const {
    __builtin_prefetch(code + out);
    __builtin_prefetch(delta + out);
  }
  void end(int c) { store(sums + c, load(sums + c) + sum); }
  void pixel(int64_t at) { store(result + at, Num<T>{}); }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
