// Direct convolution: an output pixel of many images at a time, which read theirs where it lies.
// What lies outside of an image is not multiplied.
#pragma once

#include "gather.h"
#include "product.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// Rows of a panel are then no multiple of 4 KiB apart, and long enough for the last tile.
using fastmeta::conv::kGap;
using fastmeta::conv::kPanelBytes;

// One of the products that a convolution adds up: images, and a weight [depth, cols].
template <class T>
struct Operand {
  const T* images;
  const T* weight;
};

// Where a line of pixels, each `scale` after the one before it, lies inside: those from `first` up
// to `last` of `count`.
struct Inside {
  int first, last;
  Inside(int origin, int scale, int count, int size)
      : first(origin < 0 ? (scale - 1 - origin) / scale : 0),
        last(origin < size ? (size - origin + scale - 1) / scale : 0) {
    if (last > count) last = count;
    if (first > last) first = last;
  }
  int count() const { return last - first; }
};

// Appends to `terms` what an output pixel reads, with its weight; returns how many.
template <class T>
int add_terms(const Grid& grid, const Images<const T>& in, const T* weight, int cols, int row,
              int col, Term<T>* terms) {
  const int top = row * grid.scale[0] + grid.origin[0], left = col * grid.scale[1] + grid.origin[1];
  int count = 0;
  for (const Run *run = grid.runs.data(), *end = run + grid.runs.size(); run < end; ++run) {
    const int y = top + run->row, x = left + run->col;
    const Inside inside(x, 1, run->count, in.width);
    if (y >= 0 && y < in.height && inside.count() > 0) {
      const T* const a = in.data + (int64_t(y) * in.width + x + inside.first) * in.channels;
      const T* const b = weight + int64_t(inside.first) * in.channels * cols;
      terms[count++] = {a, b, inside.count() * in.channels};
    }
    weight += int64_t(run->count) * in.channels * cols;
  }
  return count;
}

// Rows of a tile. A cache's lines a page apart have but a few places there.
inline int rows_together(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  return bytes % kPage == 0 && kTileRows > 8 ? 8 : kTileRows;
}

// out = the convolution over a grid, summed over operands; `then(rows, live)` after each tile of
// pixels, while they are close. `terms`: a buffer for all that a pixel reads.
template <class T, class Then>
void convolve(const Grid& grid, int64_t examples, Images<const T> in, const Operand<T>* operands,
              int count, Images<T> out, Term<T>* terms, Then then) {
  const int64_t image = in.size(), out_image = out.size();
  const int most = rows_together(image * int64_t(sizeof(T)));
  const int64_t depth = int64_t(grid.taps.size()) * in.channels * count;
  cpu::Budget& budget = cpu::budget();
  for (int64_t first = 0; first < examples; first += most) {
    const int live = examples - first < most ? int(examples - first) : most;
    for (int y = 0; y < grid.rows; ++y) {
      for (int x = 0; x < grid.cols; ++x) {
        int found = 0;
        for (int o = 0; o < count; ++o) {
          in.data = operands[o].images;
          found += add_terms(grid, in, operands[o].weight, out.channels, y, x, terms + found);
        }
        const int64_t place = int64_t(y * grid.step[0] + grid.start[0]) * out.width +
                              x * grid.step[1] + grid.start[1];
        T* const to = out.data + first * out_image + place * out.channels;
        multiply<T>({terms, found, first * image, image, out.channels, to, out_image, false}, live);
        T* rows[kTileRows];
        for (int i = 0; i < live; ++i) rows[i] = to + i * out_image;
        then(rows, live);
      }
      spend(budget, grid.cols * live * depth * out.channels / lanes<T>);
    }
  }
}

// weight [depth, cols] += a panel's part in its gradient: of rows that `live` pixels read.
template <class T>
void add_panel(const T* panel, int64_t pitch, int depth, const T* derivative,
               int64_t derivative_pitch, int cols, int live, T* weight) {
  outer({{1, 1, live}, {0, 0, pitch}, {0, 0, derivative_pitch}}, panel, depth, derivative, cols,
        weight);
}

// As convolve_weight, by rows of what pixels read: where a tap's channels are too few for a tile.
template <class T>
void convolve_weight_by_rows(const Grid& grid, int64_t examples, const Images<const T>& in,
                             const Images<const T>& derivative, T* weight, T* panel) {
  const int depth = int(grid.taps.size()) * in.channels, cols = derivative.channels;
  const int64_t pitch = depth + kGap, pixels = examples * grid.rows * grid.cols;
  int64_t most = kPanelBytes / int64_t(sizeof(T)) / pitch;
  if (most < kTileRows) most = kTileRows;
  cpu::Budget& budget = cpu::budget();
  for (int64_t first = 0; first < pixels; first += most) {
    const int live = int(pixels - first < most ? pixels - first : most);
    gather(grid, in, first, live, panel, pitch);
    add_panel(panel, pitch, depth, derivative.data + first * cols, cols, cols, live, weight);
    spend(budget, int64_t(live) * depth * cols / lanes<T>);
  }
}

// weight [taps, in, out] += the sum over pixels of what they read, times their derivatives.
template <class T>
void convolve_weight(const Grid& grid, int64_t examples, const Images<const T>& in,
                     const Images<const T>& derivative, T* weight) {
  const int64_t row = int64_t(in.width) * in.channels, cols = derivative.channels;
  cpu::Budget& budget = cpu::budget();
  for (const Run *run = grid.runs.data(), *end = run + grid.runs.size(); run < end; ++run) {
    const int top = grid.origin[0] + run->row;
    const Inside rows(top, grid.scale[0], grid.rows, in.height);
    for (int tap = 0; tap < run->count; ++tap, weight += in.channels * cols) {
      const int left = grid.origin[1] + run->col + tap;
      const Inside across(left, grid.scale[1], grid.cols, in.width);
      if (rows.count() == 0 || across.count() == 0) continue;
      const T* const a = in.data + (top + rows.first * grid.scale[0]) * row +
                         int64_t(left + across.first * grid.scale[1]) * in.channels;
      const T* const b = derivative.data + (int64_t(rows.first) * grid.cols + across.first) * cols;
      const int64_t a_step = int64_t(grid.scale[1]) * in.channels;
      Pairs pairs{{examples, rows.count(), across.count()},
                  {in.size(), grid.scale[0] * row, a_step},
                  {derivative.size(), grid.cols * cols, cols}};
      if (examples > pairs.count[2]) {
        for (int64_t* each : {pairs.count, pairs.a, pairs.b}) {
          const int64_t of_examples = each[0];
          each[0] = each[1], each[1] = each[2], each[2] = of_examples;
        }
      }
      outer(pairs, a, in.channels, b, int(cols), weight);
      spend(budget, examples * rows.count() * across.count() * in.channels * cols / lanes<T>);
    }
  }
}

// The weight as the adjoint's grids take it, one after the other: [taps, out, in].
template <class T>
void transpose_weight(const fastmeta::conv::Shape& shape, const T* weight, T* transposed) {
  const int64_t size = int64_t(shape.in) * shape.out;
  const Grid* grids = shape.backward.data();
  for (int g = 0; g < int(shape.backward.size()); ++g) {
    const int* taps = grids[g].taps.data();
    for (int i = 0; i < int(grids[g].taps.size()); ++i, transposed += size) {
      transpose(weight + taps[i] * size, shape.in, shape.out, transposed);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
