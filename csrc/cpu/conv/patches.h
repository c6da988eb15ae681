// Mean and covariance of the patches that the output pixels of a convolution read.
//
// Two elements of a patch lie as far apart in every pixel's patch. So rows of the image are multiplied
// with rows, once for all pairs of a patch's rows that lie as far apart, where the image lies.
#pragma once

#include "gather.h"
#include "product.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::kShallow;
using fastmeta::conv::Layout;
using fastmeta::conv::Shape;

template <class T>
class Patches {
 public:
  // Of images [height, width, channels] in their frame.
  Patches(const Shape& shape, const Layout& layout, int height, int width, T* workspace)
      : s(shape), depth(s.depth()), height(height), period(s.in * lanes<T>),
        pitch(layout.patch_pitch), line(int64_t(width) * s.in), level(workspace + layout.patches),
        squares(level + period), centred(squares + int64_t(pitch) * pitch) {
    for (const Run *run = s.forward.runs.data(), *end = run + s.forward.runs.size(); run < end;
         ++run) {
      if (rows == 0 || row[rows - 1] != run->row) row[rows++] = run->row;
      if (rows > 1) continue;
      for (int i = 0; i < run->count * s.in; ++i) place[length++] = run->col * s.in + i;
    }
  }

  // Mean [depth] and covariance [depth, depth] of a set.
  // Images are centred one by one and merged in double precision: a filter whose weights add up to
  // nothing takes images' levels away, and would else take the digits of their squares' sums.
  void measure(const T* x, int64_t examples, double* mean, double* covariance) const {
    double first[kShallow], second[kShallow * kShallow], apart[kShallow];
    const double pixels = s.pixels();
    for (int k = 0; k < depth; ++k) mean[k] = 0;
    for (int k = 0; k < depth * depth; ++k) covariance[k] = 0;
    cpu::Budget& budget = cpu::budget();
    for (int64_t n = 0; n < examples; ++n) {
      spend(budget, int64_t(s.pixels()) * depth * depth / lanes<T>);
      centre(x + n * height * line);
      add_up(first, second);
      const double share = 1 / double(n + 1), weight = pixels * double(n) * share;
      for (int k = 0; k < depth; ++k) {
        first[k] /= pixels;
        apart[k] = level[place[k % length] % s.in] + first[k] - mean[k];
        mean[k] += share * apart[k];
      }
      for (int k = 0; k < depth; ++k) {
        for (int j = 0; j < depth; ++j) {
          covariance[k * depth + j] += second[k * depth + j] - pixels * first[k] * first[j] +
                                       weight * apart[k] * apart[j];
        }
      }
    }
    const double all = pixels * double(examples);
    for (int k = 0; k < depth * depth; ++k) covariance[k] /= all;
  }

 private:
  // Pixels whose products are summed before they go to double precision.
  static constexpr int kTogether = 512;

  const Shape& s;
  const int depth, height, period, pitch;
  const int64_t line;
  T *const level;    // of the image at hand, each channel's in turn [period]
  T *const squares;  // [span of a patch's row, pitch]
  T *const centred;  // that image
  int rows = 0, row[kShallow];       // of a patch: how many, and which of the image's
  int length = 0, place[kShallow];   // of a patch's row: its elements, and their offsets

  void centre(const T* image) const {
    constexpr int L = lanes<T>;
    const int64_t size = height * line, whole = size / period * period;
    conv::clear(level, period);
    for (int64_t i = 0; i < whole; i += period) {
      for (int v = 0; v < period; v += L) store(level + v, load(level + v) + load(image + i + v));
    }
    for (int64_t i = whole; i < size; ++i) level[i - whole] += image[i];
    for (int c = 0; c < s.in; ++c) {
      T sum = 0;
      for (int i = c; i < period; i += s.in) sum += level[i];
      for (int i = c; i < period; i += s.in) level[i] = sum * T(s.in) / T(size);
    }
    for (int64_t i = 0; i < whole; i += period) {
      for (int v = 0; v < period; v += L) store(centred + i + v, load(image + i + v) - load(level + v));
    }
    for (int64_t i = whole; i < size; ++i) centred[i] = image[i] - level[i - whole];
  }

  // Sums over the pixels of the centred image's patches, first [depth], second [depth, depth].
  void add_up(double* first, double* second) const {
    for (int k = 0; k < depth; ++k) first[k] = 0;
    for (int k = 0; k < depth * depth; ++k) second[k] = 0;
    const int step = s.forward.scale[0], most = s.cols < kTogether ? kTogether / s.cols : 1;
    for (int below = 0; below < rows; ++below) {
      for (int phase = 0; phase < step; ++phase) {
        for (int top = phase; top < height;) {
          const uint32_t found = readers(top, below);
          int count = 1;
          while (count < most && readers(top + count * step, below) == found) ++count;
          if (found != 0) add_rows(top, count, below, found, first, second);
          top += count * step;
        }
      }
    }
  }

  // Which rows of patches, `below` before the last at least, an image's row is.
  uint32_t readers(int at, int below) const {
    uint32_t found = 0;
    for (int r = 0; r + below < rows; ++r) {
      const int pixel = at - row[r], step = s.forward.scale[0];
      if (pixel >= 0 && pixel % step == 0 && pixel / step < s.rows) found |= uint32_t(1) << r;
    }
    return found;
  }

  // Of `count` rows of the image with those that a patch has so many rows below.
  void add_rows(int top, int count, int below, uint32_t found, double* first,
                double* second) const {
    const int64_t down = s.forward.scale[0] * line, across = int64_t(s.forward.scale[1]) * s.in;
    const T *const left = centred + top * line, *const right = left + (row[below] - row[0]) * line;
    const int span = place[length - 1] + 1;
    conv::clear(squares, int64_t(span) * pitch);
    outer<T>({{1, count, s.cols}, {0, down, across}, {0, down, across}}, left, span, right, pitch,
             squares);
    for (int r = 0; r + below < rows; ++r) {
      if ((found >> r & 1) == 0) continue;
      const int from = r * length, to = (r + below) * length;
      for (int i = 0; i < length; ++i) {
        for (int j = 0; j < length; ++j) {
          const double sum = squares[int64_t(place[i]) * pitch + place[j]];
          second[(from + i) * depth + to + j] += sum;
          if (below > 0) second[(to + j) * depth + from + i] += sum;
        }
      }
    }
    if (below > 0) return;
    for (int v = 0; v < pitch; v += lanes<T>) {
      Num<T> sum{};
      for (int y = 0; y < count; ++y) {
        for (int x = 0; x < s.cols; ++x) sum += load(left + y * down + x * across + v);
      }
      store(squares + v, sum);
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; (found >> r & 1) != 0 && i < length; ++i) {
        first[r * length + i] += squares[place[i]];
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
