// A set's images as the kernels read them.
#pragma once

#include <algorithm>

#include "tensors.h"
#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T>
class Placing {
 public:
  Placing(const Network& network, const Layout& layout, T* workspace)
      : n(network), layout(layout), workspace(workspace) {}

  // Channels last, in a frame of zeros. Where batch statistics take away what all patches have in
  // common, each channel's level is taken already here, and its digits with it: that of a blank
  // background, which becomes zero, so that what rounding makes of all its pixels alike has no
  // weight; else the mean.
  void place(const T* x, int64_t examples, T* to) const {
    const fastmeta::conv::Block& b = n.blocks[0];
    const int top = layout.frame[0], left = layout.frame[1];
    const int64_t plane = int64_t(b.height) * b.width, across = b.width + 2 * left;
    T* const level = workspace + (layout.centres ? layout.pulls : layout.zero);
    for (int c = 0; layout.centres && examples > 0 && c < b.channels; ++c) {
      const T* const channel = x + c * plane;
      if (is_blank(channel, examples, b.channels * plane, plane, level[c])) continue;
      double sum = 0;
      for (int64_t e = 0; e < examples; ++e) sum += total(channel + e * b.channels * plane, plane);
      level[c] = T(sum / double(examples * plane));
    }
    const auto pad = [&](int64_t pixels) {
      for (int64_t i = 0; i < pixels; ++i) {
        for (int c = 0; c < b.channels; ++c) *to++ = -level[c];
      }
    };
    for (int64_t e = 0; e < examples; ++e, x += b.channels * plane) {
      pad(top * across);
      for (int64_t first = 0; first < plane; first += b.width) {
        pad(left);
        for (int64_t i = first; i < first + b.width; ++i) {
          for (int c = 0; c < b.channels; ++c) *to++ = x[c * plane + i] - level[c];
        }
        pad(left);
      }
      pad(top * across);
    }
  }

 private:
  const Network& n;
  const Layout& layout;
  T* const workspace;

  // Whether of some pixels of a channel, whose images lie `pitch` apart, a third are equal to their
  // median, `level`. They are sorted by insertion: NaN only leaves them out of order.
  static bool is_blank(const T* x, int64_t examples, int64_t pitch, int64_t plane, T& level) {
    constexpr int kSample = 63;
    T sorted[kSample];
    for (int i = 0; i < kSample; ++i) {
      const int64_t at = examples * plane * i / kSample;
      const T one = x[at / plane * pitch + at % plane];
      int j = i;
      for (; j > 0 && sorted[j - 1] > one; --j) sorted[j] = sorted[j - 1];
      sorted[j] = one;
    }
    level = sorted[kSample / 2];
    return std::count(sorted, sorted + kSample, level) >= kSample / 3;
  }
  static T total(const T* from, int64_t count) {
    Num<T> sum{};
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) sum += conv::load(from + i);
    T all[lanes<T>], rest = 0;
    conv::store(all, sum);
    for (int l = 0; l < lanes<T>; ++l) rest += all[l];
    for (; i < count; ++i) rest += from[i];
    return rest;
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
