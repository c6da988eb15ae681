// Where a task's blocks of parameters and what is like them lie.
#pragma once

#include "tensors.h"
#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::Call;

template <class T>
struct TaskViews {
  const Network& n;
  const Layout& layout;
  const Call<T>& call;
  const int64_t task;
  T* const workspace;
  T* const sums;  // [block, those of rates, those of options]: what is added up over tasks
  const int depth = int(n.blocks.size());

  // The block of theta_k. Those of all steps share one, where they are not kept.
  T* theta(int k) const {
    return workspace + layout.weights + (layout.weights_kept > 1 ? k - 1 : 0) * layout.block;
  }
  const T* parameters(int k) const { return k == 0 ? call.parameters : theta(k); }
  T* gradient(int k) const {
    return workspace + layout.gradient + (layout.gradients_kept > 1 ? k : 0) * layout.block;
  }
  // The j-th state of an update rule after k > 0 steps.
  T* state(int j, int k) const {
    return workspace + layout.states[j] + (layout.states_kept > 1 ? k - 1 : 0) * layout.block;
  }
  T* cotangent(int j) const { return workspace + layout.cotangents[j]; }
  // What clipping scales g_k by.
  T& clip(int k) const { return workspace[layout.clips + k]; }
  T* lambda() const { return workspace + layout.lambda; }
  T* vector() const { return workspace + layout.vector; }
  T* anchor() const { return workspace + layout.anchor; }

  void add(T w, const T* from, int64_t count, T* to) const {
    for (int64_t i = 0; i < count; ++i) to[i] += w * from[i];
  }

  // use(layer, tensor, offset in a block, size) of what is not in the body
  template <class Use>
  void head_tensors(Use use) const {
    for (int l = layout.body; l < depth; ++l) {
      const Shape& s = layout.shapes[l];
      for (int i = 0; i < kTensors; ++i) {
        if (!n.blocks[l].has[i]) continue;
        use(l, i, s.of[i], i == kWeight ? int64_t(s.depth()) * s.out : int64_t(s.out));
      }
    }
  }
  // The same of what adapts.
  template <class Use>
  void adapting(Use use) const {
    head_tensors([&](int l, int i, int64_t from, int64_t size) {
      if (n.blocks[l].adapts[i]) use(l, i, from, size);
    });
  }

  // Of a tensor, or of each element by its place in a block.
  struct Rate {
    T one;
    const T* each;
    T operator()(int64_t j) const { return each ? each[j] : one; }
    Num<T> vector(int64_t j) const { return each ? conv::load(each + j) : all(one); }
  };
  Rate rate(int k, int l, int tensor) const {
    if (n.elementwise_rates) return {T(0), call.rates + k * layout.block};
    return {call.rates[(k * depth + l) * kTensors + tensor], nullptr};
  }
  // Where gradients of rates are summed: one of a tensor's, or each by its place in a block.
  T* rate_sum(int k, int l, int tensor) const {
    return sums + layout.block + (k * depth + l) * kTensors + tensor;
  }
  T* rate_sums(int k) const { return sums + layout.block * (1 + k); }
  // And those of learned options.
  T* option_sums() const {
    const int64_t rates = n.elementwise_rates ? layout.block : depth * kTensors;
    return sums + layout.block + (n.learned_rates ? n.steps * rates : 0);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
