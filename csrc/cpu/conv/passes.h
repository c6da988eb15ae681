// Norm, activation and maximum as single passes over a convolution's output, and their derivatives.
// The rules are those of csrc/batch_norm.h; n is the normalised product.
#pragma once

#include "windows.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// value from product
template <class T, class Added>
struct Forward : PassBase<T, Added> {
  const T* product;
  T* value;
  template <int W>
  void window(int64_t in, int64_t out) {
    this->template pick<W>(product, in, out);
    store(value + out, this->point.value());
  }
  template <int W>
  void ahead(int64_t in, int64_t) const {
    fetch_window<W>(product + in, this->field);
  }
};

// sums[0] += dz and sums[1] += n dz, over pixels
template <class T, class Added>
struct BackwardSums : PassBase<T, Added> {
  const T *product, *delta;
  T* sums;
  Num<T> plain{}, along{};
  void begin(int c) {
    PassBase<T, Added>::begin(c);
    plain = along = Num<T>{};
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    this->template pick<W>(product, in, out);
    const auto& p = this->point;
    const Num<T> dz = p.slope() * load(delta + out);
    plain += dz;
    along += p.normalised(p.product) * dz;
  }
  template <int W>
  void ahead(int64_t in, int64_t) const {
    fetch_window<W>(product + in, this->field);
  }
  void end(int c) {
    T *first = sums + c, *second = sums + this->field.channels + c;
    store(first, load(first) + plain);
    store(second, load(second) + along);
  }
};

// The derivatives by the product, to `result`, which may be `product`, and by what is added.
template <class T, class Added>
struct Backward : PassBase<T, Added> {
  static constexpr bool everywhere = true;
  const T *product, *delta;
  Pull<T> pull;
  T* result;
  Num<T> plain{}, along{};
  void begin(int c) {
    PassBase<T, Added>::begin(c);
    plain = load(pull.plain + c), along = load(pull.along + c);
  }
  void put(int64_t at, Num<T> dz) const {
    const Num<T> n = this->point.normalised(load(product + at));
    store(result + at, this->point.factor * (dz - plain - n * along));
    this->added.give(at, dz);
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    this->template pick<W>(product, in, out);
    const auto& p = this->point;
    const Field& f = this->field;
    const Num<T> dz = p.slope() * load(delta + out);
    const int height = W ? W : f.window[0], width = W ? W : f.window[1];
    int index = 0;
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j, ++index) {
        put(in + (int64_t(i) * f.cols + j) * f.channels, W == 1 ? dz : p.chosen(index, dz));
      }
    }
  }
  void pixel(int64_t at) { put(at, Num<T>{}); }
  template <int W>
  void ahead(int64_t in, int64_t) const {
    fetch_window<W>(product + in, this->field);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
