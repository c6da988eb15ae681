// What a block reads, and what it adds to its norm's result: another block's output, the data, or
// nothing.
#pragma once

#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// Null: there is none; of the tangent, that the value does not move; of the derivative, that nothing
// asks for it.
template <class T>
struct Read {
  static constexpr bool is_there = true;
  const T *value = nullptr, *tangent = nullptr;
  T* delta = nullptr;  // where the derivative by the value goes, or the tangent of that
  bool adds = false;   // to what lies there

  // As what is added, in the order of the product.
  Num<T> on(Num<T> z, int64_t at) const { return z + load(value + at); }
  void give(int64_t at, Num<T> dz) const {
    if (delta != nullptr) store(delta + at, adds ? load(delta + at) + dz : dz);
  }
};

// In place of what is added, where nothing is.
template <class T>
struct Nothing {
  static constexpr bool is_there = false;
  Num<T> on(Num<T> z, int64_t) const { return z; }
  void give(int64_t, Num<T>) const {}
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
