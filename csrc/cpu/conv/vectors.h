// The vectors that the convolutional kernels count in: lanes are channels.
#pragma once

#include <cstdint>

#include "../spend.h"

#if defined(FASTMETA_BYTES)
#include "../math.h"
#include "../transpose.h"
#else
#include "../../scalars.h"
#endif

namespace fastmeta::FASTMETA_NAMESPACE::conv {

#if defined(FASTMETA_BYTES)
template <class T>
using Num = typename Vector<T>::type;
#else
template <class T>
using Num = T;
#endif

template <class T>
constexpr int lanes = sizeof(Num<T>) / sizeof(T);

template <class T>
Num<T> load(const T* from) {
  Num<T> whole;
  __builtin_memcpy(&whole, from, sizeof whole);
  return whole;
}

template <class T>
void store(T* to, Num<T> whole) {
  __builtin_memcpy(to, &whole, sizeof whole);
}

template <class T>
Num<T> all(T number) {
  return number - Num<T>{};  // a sum would have to be computed: it makes 0 of -0
}

// to [cols, rows] from [rows, cols]; both multiples of the lanes.
template <class T>
void transpose(const T* from, int rows, int cols, T* to) {
#if defined(FASTMETA_BYTES)
  transposed_parts<true, Num<T>>(from, cols, rows, cols, [=](int j, int i, Num<T> part) {
    store(to + int64_t(j) * rows + i, part);
  });
#else
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) to[int64_t(j) * rows + i] = from[int64_t(i) * cols + j];
  }
#endif
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
