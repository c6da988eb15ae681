// The mean over an image, and its adjoint.
#pragma once

#include "windows.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// to [examples, channels] from images [examples, out_rows, out_cols, channels]
template <class T>
void average(const Field& f, int64_t examples, const T* images, T* to) {
  const int64_t pixels = int64_t(f.out_rows) * f.out_cols;
  const T share = T(1) / T(pixels);
  for (int64_t n = 0; n < examples; ++n, images += pixels * f.channels) {
    for (int c = 0; c < f.channels; c += lanes<T>) {
      Num<T> sum{};
      for (int64_t p = 0; p < pixels; ++p) sum += load(images + p * f.channels + c);
      store(to + n * f.channels + c, sum * share);
    }
  }
}

// The other way.
template <class T>
void spread(const Field& f, int64_t examples, const T* from, T* images) {
  const int64_t pixels = int64_t(f.out_rows) * f.out_cols;
  const T share = T(1) / T(pixels);
  for (int64_t n = 0; n < examples; ++n, images += pixels * f.channels) {
    for (int c = 0; c < f.channels; c += lanes<T>) {
      const Num<T> each = load(from + n * f.channels + c) * share;
      for (int64_t p = 0; p < pixels; ++p) store(images + p * f.channels + c, each);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
