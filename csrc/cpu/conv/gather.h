// What the output pixels of a convolution read, as rows of a matrix.
#pragma once

#include "chain.h"
#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::Grid;
using fastmeta::conv::Run;

// Images [examples, height, width, channels].
template <class T>
struct Images {
  T* data;
  int height, width, channels;
};

template <class T>
void copy(const T* from, int count, T* to) {
  int i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

template <class T>
void clear(T* to, int64_t count) {
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(to + i, Num<T>{});
  for (; i < count; ++i) to[i] = T(0);
}

// A grid's output pixels in their order, from one of them on.
class Walk {
 public:
  Walk(const Grid& grid, int64_t first) : grid_(grid) {
    col_ = int(first % grid.cols);
    row_ = int(first / grid.cols % grid.rows);
    example_ = first / (int64_t(grid.rows) * grid.cols);
  }
  void step() {
    if (++col_ < grid_.cols) return;
    col_ = 0;
    if (++row_ < grid_.rows) return;
    row_ = 0;
    ++example_;
  }
  // Where it lies in images of that size.
  int64_t place(int height, int width) const {
    const int y = row_ * grid_.step[0] + grid_.start[0], x = col_ * grid_.step[1] + grid_.start[1];
    return (example_ * height + y) * width + x;
  }
  // to: the numbers that it reads, zeros for those outside of the image.
  template <class T>
  void read(const Images<const T>& in, T* to) const {
    const int top = row_ * grid_.scale[0] + grid_.origin[0];
    const int left = col_ * grid_.scale[1] + grid_.origin[1];
    const T* image = in.data + example_ * in.height * in.width * in.channels;
    const Run* runs = grid_.runs.data();
    const int count = int(grid_.runs.size());
    for (int r = 0; r < count; ++r) {
      const int y = top + runs[r].row, x = left + runs[r].col, end = x + runs[r].count;
      const bool inside = y >= 0 && y < in.height;
      const int from = inside ? clamped(x, in.width) : 0, until = inside ? clamped(end, in.width) : 0;
      if (from >= until) {
        conv::clear(to, int64_t(end - x) * in.channels);
      } else {
        conv::clear(to, int64_t(from - x) * in.channels);
        conv::copy(image + (int64_t(y) * in.width + from) * in.channels,
                   (until - from) * in.channels, to + int64_t(from - x) * in.channels);
        conv::clear(to + int64_t(until - x) * in.channels, int64_t(end - until) * in.channels);
      }
      to += int64_t(end - x) * in.channels;
    }
  }

 private:
  const Grid& grid_;
  int col_, row_;
  int64_t example_;

  static int clamped(int x, int width) { return x < 0 ? 0 : x > width ? width : x; }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
