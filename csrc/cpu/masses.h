// What the labels of sets count for together, of sets that the kernels see in parts only.
#pragma once

#include <cstdint>
#include <vector>

#include "../network.h"

namespace fastmeta::cpu {

// How many labels of each set of `count` count, or the sum of their classes' weights; labels and weights
// are null where there are none.
template <class T>
std::vector<T> masses(const Loss& loss, const int64_t* labels, const T* example_weights,
                      const T* class_weights, int64_t sets, int count) {
  std::vector<T> found;
  if (labels == nullptr || loss.kind != LossKind::cross_entropy) return found;
  for (int64_t set = 0; set < sets; ++set) {
    double mass = 0;
    for (int64_t i = set * count; i < (set + 1) * count; ++i) {
      const bool is_there = example_weights == nullptr || example_weights[i] > T(0);
      if (!is_there || labels[i] == loss.ignore_index) continue;
      mass += class_weights ? class_weights[labels[i]] : T(1);
    }
    found.push_back(T(mass));
  }
  return found;
}

}  // namespace fastmeta::cpu
