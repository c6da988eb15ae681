// Windows of a convolution's output, norm and activation there, and what goes over all of them. z
// is what the activation takes, `added` included. A maximum's derivative goes to the first of
// equals, as in torch.
#pragma once

#include "layout.h"
#include "read.h"

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

// Which pixel of a window is its greatest is kept as a code: its place where the activation takes more
// than zero, else -1 - place.
template <class T>
Num<T> place_of(const T* code) {
  const Num<T> given = load(code);
  return select(given < Num<T>{}, T(-1) - given, given);
}

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
  template <int W, class Added>
  void pick(const T* u, const Added& added, int64_t in, const Field& f) {
    const int height = W ? W : f.window[0], width = W ? W : f.window[1];
    int index = 0;
#pragma GCC unroll 2
    for (int i = 0; i < height; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < width; ++j, ++index) {
        const int64_t at = in + (int64_t(i) * f.cols + j) * f.channels;
        const N one = load(u + at), z = added.on((one - mean) * factor + shift, at);
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
  // The pixel chosen before. Codes are kept of blocks with an expression alone: their `below` is 1, so
  // that slope() is 1 whatever best is, and the expression's slope is applied in behind.h.
  template <int W>
  void take(const T* u, const T* code, int64_t in, const Field& f) {
    place = place_of(code);
    best = N{}, product = at_place<W>(u, in, f);
  }
  // Of the pixels of a window, the greatest's.
  template <int W>
  N at_place(const T* from, int64_t in, const Field& f) const {
    const int height = W ? W : f.window[0], width = W ? W : f.window[1];
    N found = load(from + in);
    int index = 0;
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j, ++index) {
        if (index == 0) continue;
        const N one = load(from + in + (int64_t(i) * f.cols + j) * f.channels);
        found = select(place == all(T(index)), one, found);
      }
    }
    return found;
  }
  N value() const { return select(best < N{}, flat ? N{} : best * below, best); }
  N slope() const { return select(best > N{}, all(T(1)), below); }
  // Of one pixel, by which it is of its window.
  N chosen(int index, N derivative) const {
    return select(place == all(T(index)), derivative, N{});
  }
};

// Goes over the windows of examples, channels by channels in each row of windows, and, where the pass
// asks for it, over the pixels outside of any. With each it is told the window below, to fetch it.
template <int W, class Pass>
void over_windows(const Field& f, int64_t from, int64_t to, Pass pass) {
  cpu::Budget& budget = cpu::budget();
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
          const int64_t at = in + int64_t(x) * width * f.channels + c;
          pass.template window<W>(at, out + int64_t(x) * f.channels + c);
          pass.template ahead<W>(at + height * row, out + out_row + int64_t(x) * f.channels + c);
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
    spend(budget, image / L);
  }
}

// Prefetches a window. Pixels beside each other the processor fetches by itself.
template <int W, class T>
void fetch_window(const T* from, const Field& f) {
  if (W == 1) return;
  const int height = W ? W : f.window[0], width = W ? W : f.window[1];
  for (int i = 0; i < height; ++i) {
    for (int j = 0; j < width; ++j) __builtin_prefetch(from + (i * f.cols + j) * f.channels);
  }
}

template <class Pass>
void run_pass(const Field& f, int64_t from, int64_t to, const Pass& pass) {
  if (f.window[0] == 1 && f.window[1] == 1) return over_windows<1>(f, from, to, pass);
  if (f.window[0] == 2 && f.window[1] == 2) return over_windows<2>(f, from, to, pass);
  over_windows<0>(f, from, to, pass);
}

// `Added`: Read or Nothing.
template <class T, class Added>
struct PassBase {
  using N = Num<T>;
  static constexpr int lanes = conv::lanes<T>;
  static constexpr bool everywhere = false;
  const Field& field;
  Rule<T> rule;
  Added added;
  const T* code;  // where the choice is kept; or null
  Point<T> point{};
  void begin(int c) { point.begin(rule, c); }
  void end(int) {}
  void pixel(int64_t) {}
  template <int W>
  void ahead(int64_t, int64_t) const {}
  template <int W>
  void pick(const T* u, int64_t in, int64_t out) {
    if (code) return point.template take<W>(u, code + out, in, field);
    point.template pick<W>(u, added, in, field);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
