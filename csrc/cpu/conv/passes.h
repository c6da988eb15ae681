// Norm, activation and maximum as single passes over a convolution's output: forward, backward and
// the tangents of both. The rules are those of csrc/batch_norm.h; n is the normalised product, z what
// the activation takes. A maximum's derivative goes to the first of equals, as in torch.
#pragma once

#include "chain.h"
#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// The output of a convolution [examples, rows, cols, channels] and the windows of its maximum.
struct Field {
  int rows, cols, out_rows, out_cols, channels;
  int window[2];
};

// What a block's norm and activation are made of, each [channels].
template <class T>
struct Rule {
  const T *mean, *inverse, *scale, *shift;
  T below;  // the activation's slope up to zero
};

// Shares of sums over the pixels, by which the statistics move; zeros where they don't.
template <class T>
struct Pull {
  const T *plain, *along;
};

// A rule's constants for some channels, and the greatest of a window by it.
template <class T>
struct Point {
  using N = Num<T>;
  N mean, inverse, scale, shift, factor, below;
  bool flat;
  N best, product, place;  // of the greatest: z, the product, which it is

  void begin(const Rule<T>& rule, int c) {
    mean = load(rule.mean + c), inverse = load(rule.inverse + c);
    scale = load(rule.scale + c), shift = load(rule.shift + c);
    factor = scale * inverse, below = all(rule.below), flat = rule.below == T(0);
  }
  N normalised(N u) const { return (u - mean) * inverse; }
  template <int W>
  void pick(const T* u, const Field& f) {
    const int height = W ? W : f.window[0], width = W ? W : f.window[1];
    int index = 0;
#pragma GCC unroll 2
    for (int i = 0; i < height; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < width; ++j, ++index) {
        const N one = load(u + (int64_t(i) * f.cols + j) * f.channels);
        const N z = (one - mean) * factor + shift;
        if (index == 0) {
          best = z, product = one, place = N{};
          continue;
        }
        // What is not a number wins, as in torch.
        const auto more = (z > best) | (z != z);
        best = select(more, z, best), product = select(more, one, product);
        place = select(more, all(T(index)), place);
      }
    }
  }
  N value() const { return select(best < N{}, flat ? N{} : best * below, best); }
  N slope() const { return select(best > N{}, all(T(1)), below); }
  // Of one pixel, by which it is of its window.
  N chosen(int index, N derivative) const {
    return select(place == all(T(index)), derivative, N{});
  }
};

// Goes over the windows of examples, channels by channels in each row of windows, and, where the pass
// asks for it, over the pixels outside of any.
template <int W, class Pass>
void over_windows(const Field& f, int64_t from, int64_t to, Pass pass) {
  constexpr int L = Pass::lanes;
  const int height = W ? W : f.window[0], width = W ? W : f.window[1];
  const int64_t row = int64_t(f.cols) * f.channels, image = f.rows * row;
  const int64_t out_row = int64_t(f.out_cols) * f.channels, out_image = f.out_rows * out_row;
  const auto rest = [&](int64_t at, int rows, int first, int c) {
    for (int y = 0; Pass::everywhere && y < rows; ++y) {
      for (int x = first; x < f.cols; ++x) pass.pixel(at + y * row + int64_t(x) * f.channels + c);
    }
  };
  for (int64_t n = from; n < to; ++n) {
    for (int y = 0; y < f.out_rows; ++y) {
      const int64_t in = n * image + y * height * row, out = n * out_image + y * out_row;
      for (int c = 0; c < f.channels; c += L) {
        pass.begin(c);
        for (int x = 0; x < f.out_cols; ++x) {
          pass.template window<W>(in + int64_t(x) * width * f.channels + c,
                                  out + int64_t(x) * f.channels + c);
        }
        rest(in, height, f.out_cols * width, c);
        pass.end(c);
      }
    }
    const int covered = f.out_rows * height;
    for (int c = 0; Pass::everywhere && covered < f.rows && c < f.channels; c += L) {
      pass.begin(c);
      rest(n * image + covered * row, f.rows - covered, 0, c);
      pass.end(c);
    }
  }
}

template <class Pass>
void run_pass(const Field& f, int64_t from, int64_t to, const Pass& pass) {
  if (f.window[0] == 1 && f.window[1] == 1) return over_windows<1>(f, from, to, pass);
  if (f.window[0] == 2 && f.window[1] == 2) return over_windows<2>(f, from, to, pass);
  over_windows<0>(f, from, to, pass);
}

template <class T>
struct PassBase {
  using N = Num<T>;
  static constexpr int lanes = conv::lanes<T>;
  static constexpr bool everywhere = false;
  const Field& field;
  Rule<T> rule;
  Point<T> point{};
  void begin(int c) { point.begin(rule, c); }
  void end(int) {}
  void pixel(int64_t) {}
};

// value from product
template <class T>
struct Forward : PassBase<T> {
  const T* product;
  T* value;
  template <int W>
  void window(int64_t in, int64_t out) {
    this->point.template pick<W>(product + in, this->field);
    store(value + out, this->point.value());
  }
};

// sums[0] += dz and sums[1] += n dz, over pixels
template <class T>
struct BackwardSums : PassBase<T> {
  const T *product, *delta;
  T* sums;
  Num<T> plain{}, along{};
  void begin(int c) {
    PassBase<T>::begin(c);
    plain = along = Num<T>{};
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    auto& p = this->point;
    p.template pick<W>(product + in, this->field);
    const Num<T> dz = p.slope() * load(delta + out);
    plain += dz;
    along += p.normalised(p.product) * dz;
  }
  void end(int c) {
    T *first = sums + c, *second = sums + this->field.channels + c;
    store(first, load(first) + plain);
    store(second, load(second) + along);
  }
};

// The derivative by the product; `result` may be `product`.
template <class T>
struct Backward : PassBase<T> {
  static constexpr bool everywhere = true;
  const T *product, *delta;
  Pull<T> pull;
  T* result;
  Num<T> plain{}, along{};
  void begin(int c) {
    PassBase<T>::begin(c);
    plain = load(pull.plain + c), along = load(pull.along + c);
  }
  void put(int64_t at, Num<T> dz) const {
    const Num<T> n = this->point.normalised(load(product + at));
    store(result + at, this->point.factor * (dz - plain - n * along));
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    auto& p = this->point;
    const Field& f = this->field;
    p.template pick<W>(product + in, f);
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
};

// What the tangents share: the product's, and that of scale and shift.
template <class T>
struct Moved : PassBase<T> {
  const T *product, *moving;
  Pull<T> pull;  // of the product's tangent
  const T *scale, *shift;
  Num<T> plain{}, along{}, r_scale{}, r_shift{};
  void begin(int c) {
    PassBase<T>::begin(c);
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
    const Field& f = this->field;
    const int height = W ? W : f.window[0], width = W ? W : f.window[1];
    Num<T> found = load(moving + in);
    int index = 0;
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j, ++index) {
        if (index == 0) continue;
        const Num<T> one = load(moving + in + (int64_t(i) * f.cols + j) * f.channels);
        found = select(this->point.place == all(T(index)), one, found);
      }
    }
    return this->point.inverse * (found - plain - n * along);
  }
};

// The tangent of value from that of product
template <class T>
struct TangentForward : Moved<T> {
  T* value;
  template <int W>
  void window(int64_t in, int64_t out) {
    auto& p = this->point;
    p.template pick<W>(this->product + in, this->field);
    const Num<T> n = p.normalised(p.product);
    const Num<T> rn = this->template tangent_of_best<W>(n, in);
    store(value + out, p.slope() * (this->r_scale * n + p.scale * rn + this->r_shift));
  }
};

// sums[0] += dz' and sums[1] += n dz' + n' dz
template <class T>
struct TangentSums : Moved<T> {
  const T *delta, *r_delta;
  T* sums;
  Num<T> first{}, second{};
  void begin(int c) {
    Moved<T>::begin(c);
    first = second = Num<T>{};
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    auto& p = this->point;
    p.template pick<W>(this->product + in, this->field);
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

// The tangent of the derivative by the product, into `result`, which may be `moving`.
template <class T>
struct TangentBackward : Moved<T> {
  static constexpr bool everywhere = true;
  const T *delta, *r_delta;
  Pull<T> of_delta, of_r_delta;
  T* result;
  Num<T> d_plain{}, d_along{}, rd_plain{}, rd_along{}, bent{};
  void begin(int c) {
    Moved<T>::begin(c);
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
  }
  template <int W>
  void window(int64_t in, int64_t out) {
    auto& p = this->point;
    const Field& f = this->field;
    p.template pick<W>(this->product + in, f);
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
