// Mean and variance of channels.
#pragma once

#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// Mean and squared deviations of channels, merged tile by tile: a variance by the sum of squares
// loses what the mean is larger by.
template <class T>
class Moments {
 public:
  Moments(T* mean, T* squares, int channels) : mean_(mean), squares_(squares), channels_(channels) {
    for (int c = 0; c < channels; ++c) mean_[c] = squares_[c] = T(0);
  }
  void add(T* const* rows, int live) {
    const T part = T(1) / T(live), share = T(live) / T(count_ + live), before = T(count_);
    for (int c = 0; c < channels_; c += lanes<T>) {
      Num<T> sum{}, squares{};
      for (int i = 0; i < live; ++i) sum += load(rows[i] + c);
      const Num<T> mean = sum * part;
      for (int i = 0; i < live; ++i) {
        const Num<T> apart = load(rows[i] + c) - mean;
        squares += apart * apart;
      }
      const Num<T> old = load(mean_ + c), apart = mean - old;
      store(mean_ + c, old + apart * share);
      store(squares_ + c, load(squares_ + c) + squares + apart * apart * (before * share));
    }
    count_ += live;
  }
  // squares become 1 / standard deviation.
  void finish(T eps) {
    for (int c = 0; c < channels_; c += lanes<T>) {
      const Num<T> variance = load(squares_ + c) * (T(1) / T(count_));
      store(squares_ + c, T(1) / sqrt(variance + eps));
    }
  }

 private:
  T *mean_, *squares_;
  int channels_;
  int64_t count_ = 0;
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
