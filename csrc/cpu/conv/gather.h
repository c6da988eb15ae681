// What the output pixels of a convolution read, as rows of a matrix.
#pragma once

#include "layout.h"
#include "vectors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::Grid;
using fastmeta::conv::Run;

// Images [examples, height, width, channels].
template <class T>
struct Images {
  T* data;
  int height, width, channels;
  int64_t size() const { return int64_t(height) * width * channels; }  // of one
};

template <class T>
void copy(const T* from, int count, T* to) {
  int i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// The same for so many rows, each its step after the one before.
template <int N, class T>
void copy_rows(const T* from, int64_t from_step, int rows, T* to, int64_t to_step) {
  for (int r = 0; r < rows; ++r, from += from_step, to += to_step) {
    __builtin_memcpy(to, from, N * sizeof(T));
  }
}
template <class T>
void copy_rows(const T* from, int64_t from_step, int rows, int count, T* to, int64_t to_step) {
  // Three taps of a grey image, and of a colored one.
  if (count == 3) return copy_rows<3>(from, from_step, rows, to, to_step);
  if (count == 9) return copy_rows<9>(from, from_step, rows, to, to_step);
  for (int r = 0; r < rows; ++r, from += from_step, to += to_step) conv::copy(from, count, to);
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
  // As many pixels on, in the same row.
  void step(int count = 1) {
    col_ += count;
    if (col_ < grid_.cols) return;
    col_ = 0;
    if (++row_ < grid_.rows) return;
    row_ = 0;
    ++example_;
  }
  int left_in_row() const { return grid_.cols - col_; }
  // Where it lies in images of that size.
  int64_t place(int height, int width) const {
    const int y = row_ * grid_.step[0] + grid_.start[0], x = col_ * grid_.step[1] + grid_.start[1];
    return (example_ * height + y) * width + x;
  }
  // to: the values that `count` pixels of this row read, zeros for those outside of the image.
  template <class T>
  void read(const Images<const T>& in, int count, T* to, int64_t pitch) const {
    const int top = row_ * grid_.scale[0] + grid_.origin[0], scale = grid_.scale[1];
    const int left = col_ * scale + grid_.origin[1];
    const T* const image = in.data + example_ * in.height * in.width * in.channels;
    const Run* const runs = grid_.runs.data();
    for (int r = 0; r < int(grid_.runs.size()); ++r, to += runs[r - 1].count * in.channels) {
      const int y = top + runs[r].row, x = left + runs[r].col, width = runs[r].count;
      if (y < 0 || y >= in.height) {
        for (int i = 0; i < count; ++i) conv::clear(to + i * pitch, width * in.channels);
        continue;
      }
      const T* const row = image + int64_t(y) * in.width * in.channels;
      // The pixels from the first to the last of those that read from inside alone.
      int first = 0, last = count;
      while (first < count && x + first * scale < 0) ++first;
      while (last > first && x + (last - 1) * scale + width > in.width) --last;
      for (int i = 0; i < first; ++i) part(row, in, x + i * scale, width, to + i * pitch);
      copy_rows(row + int64_t(x + first * scale) * in.channels, int64_t(scale) * in.channels,
                last - first, width * in.channels, to + first * pitch, pitch);
      for (int i = last; i < count; ++i) part(row, in, x + i * scale, width, to + i * pitch);
    }
  }

 private:
  const Grid& grid_;
  int col_, row_;
  int64_t example_;

  static int clamped(int x, int width) { return x < 0 ? 0 : x > width ? width : x; }
  // Pixels x ... of a row, some of them outside.
  template <class T>
  static void part(const T* row, const Images<const T>& in, int x, int width, T* to) {
    const int from = clamped(x, in.width), until = clamped(x + width, in.width);
    conv::clear(to, width * in.channels);
    if (from < until) {
      conv::copy(row + int64_t(from) * in.channels, (until - from) * in.channels,
                 to + int64_t(from - x) * in.channels);
    }
  }
};

// panel: what `count` pixels from `first` on read, `pitch` elements apart.
template <class T>
void gather(const Grid& grid, const Images<const T>& in, int64_t first, int count, T* panel,
            int64_t pitch) {
  Walk walk(grid, first);
  for (int i = 0; i < count;) {
    const int some = walk.left_in_row() < count - i ? walk.left_in_row() : count - i;
    walk.read(in, some, panel + i * pitch, pitch);
    walk.step(some);
    i += some;
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
