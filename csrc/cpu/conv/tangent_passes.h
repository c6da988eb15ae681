// The tangents of the passes, forward and backward: n' is that of the normalised product.
#pragma once

#include "windows.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// What the tangents share: the product's, and that of scale and shift.
template <class T, class Added>
struct Moved : PassBase<T, Added> {
  const T *product, *moving;
  Pull<T> pull;  // of the product's tangent
  const T *scale, *shift;
  Num<T> plain{}, along{}, r_scale{}, r_shift{};
  void begin(int c) {
    PassBase<T, Added>::begin(c);
    plain = load(pull.plain + c), along = load(pull.along + c);
    r_scale = load(scale + c), r_shift = load(shift + c);
  }
  // The tangent of n.
  Num<T> tangent(Num<T> n, int64_t at) const {
    return this->point.inverse * (load(moving + at) - plain - n * along);
  }
  // The same at the greatest of a window.
  template <int W>
  Num<T> tangent_of_best(Num<T> n, int64_t in) const {
    return this->point.inverse * (at_best<W>(moving, in) - plain - n * along);
  }
  template <int W>
  Num<T> at_best(const T* from, int64_t in) const {
    return this->point.template at_place<W>(from, in, this->field);
  }
};

// The tangent of value from that of product
template <class T, class Added>
struct TangentForward : Moved<T, Added> {
  T* value;
  template <int W>
  void window(int64_t in, int64_t out) {
    this->template pick<W>(this->product, in, out);
    const auto& p = this->point;
    const Num<T> n = p.normalised(p.product);
    const Num<T> rn = this->template tangent_of_best<W>(n, in);
    Num<T> rz = this->r_scale * n + p.scale * rn + this->r_shift;
    if constexpr (Added::is_there) {
      if (this->added.tangent != nullptr) rz += this->template at_best<W>(this->added.tangent, in);
    }
    store(value + out, p.slope() * rz);
  }
};

// sums[0] += dz' and sums[1] += n dz' + n' dz
template <class T, class Added>
struct TangentSums : Moved<T, Added> {
  const T *delta, *r_delta;
  T* sums;
  Num<T> first{}, second{};
  void begin(int c) {
    Moved<T, Added>::begin(c);
    first = second = Num<T>{};
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    this->template pick<W>(this->product, in, out);
    const auto& p = this->point;
    const Num<T> n = p.normalised(p.product), slope = p.slope();
    const Num<T> rn = this->template tangent_of_best<W>(n, in), rdz = slope * load(r_delta + out);
    first += rdz;
    second += n * rdz + rn * slope * load(delta + out);
  }
  void end(int c) {
    T *to = sums + c, *other = sums + this->field.channels + c;
    store(to, load(to) + first);
    store(other, load(other) + second);
  }
};

// The tangents of the derivatives by the product, to `result`, which may be `moving`, and by what
// is added.
template <class T, class Added>
struct TangentBackward : Moved<T, Added> {
  static constexpr bool everywhere = true;
  const T *delta, *r_delta;
  Pull<T> of_delta, of_r_delta;
  T* result;
  Num<T> d_plain{}, d_along{}, rd_plain{}, rd_along{}, bent{};
  void begin(int c) {
    Moved<T, Added>::begin(c);
    d_plain = load(of_delta.plain + c), d_along = load(of_delta.along + c);
    rd_plain = load(of_r_delta.plain + c), rd_along = load(of_r_delta.along + c);
    // s' / s = -s along, of the product's tangent
    bent = this->r_scale - this->point.factor * this->along;
  }
  void put(int64_t at, Num<T> dz, Num<T> rdz) const {
    const auto& p = this->point;
    const Num<T> n = p.normalised(load(this->product + at)), rn = this->tangent(n, at);
    const Num<T> centred = dz - d_plain - n * d_along;
    const Num<T> moved = rdz - rd_plain - rn * d_along - n * rd_along;
    store(result + at, p.inverse * (bent * centred + p.scale * moved));
    this->added.give(at, rdz);
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    this->template pick<W>(this->product, in, out);
    const auto& p = this->point;
    const Field& f = this->field;
    const Num<T> dz = p.slope() * load(delta + out), rdz = p.slope() * load(r_delta + out);
    const int height = W ? W : f.window[0], width = W ? W : f.window[1];
    int index = 0;
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j, ++index) {
        const int64_t at = in + (int64_t(i) * f.cols + j) * f.channels;
        if (W == 1) {
          put(at, dz, rdz);
        } else {
          put(at, p.chosen(index, dz), p.chosen(index, rdz));
        }
      }
    }
  }
  void pixel(int64_t at) { put(at, Num<T>{}, Num<T>{}); }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
