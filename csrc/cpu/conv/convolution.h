// Convolutions of a block behind one interface: direct, or Winograd's where that fits.
#pragma once

#include "winograd.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::Shape;

template <class T>
struct Scratch {
  T *panel, *planes;
  Term<T>* terms;
  const T* zeros;
};

template <class T>
class Convolution {
 public:
  // For sets of so many examples, though not all at a time. Where greatest values of windows are
  // looked for and an image is constant, outputs are equal by tiles of 2 x 2, which round alike
  // then, and by larger ones they are not: another than torch's first would be taken.
  Convolution(const Shape& shape, int64_t examples, const Scratch<T>& scratch)
      : s(shape), scratch(scratch), in{nullptr, s.height, s.width, s.in},
        out{nullptr, s.rows, s.cols, s.out},
        side_weight(tile_side(s.forward, s.in, examples)),
        side(s.compared && side_weight > 2 ? 2 : side_weight),
        side_back(s.backward.size() == 1 ? tile_side(s.backward.data()[0], s.out, examples) : 0) {}

  // The weight as `forward` takes it: itself, or made in `buffer`.
  const T* prepared(const T* weight, T* buffer) const {
    return transformed(side, weight, buffer);
  }
  // The weight as `backward` takes it, made in `buffer`; `transposed` is scratch.
  const T* prepared_back(const T* weight, T* transposed, T* buffer) const {
    transpose_weight(s, weight, transposed);
    return transformed(side_back, transposed, buffer);
  }

  // to [examples, rows, cols, out] = the sum over operands; `then(rows, live)` after every few
  // pixels, while they are close.
  template <class Then>
  void forward(const Operand<T>* operands, int count, int64_t examples, T* to, Then then) const {
    const Images<const T> from{nullptr, in.height, in.width, in.channels};
    const Images<T> result{to, out.height, out.width, out.channels};
    if (side == 4) {
      convolve_winograd<4>(s.forward, examples, from, operands, count, result, scratch.zeros,
                           scratch.planes, then);
    } else if (side == 2) {
      convolve_winograd<2>(s.forward, examples, from, operands, count, result, scratch.zeros,
                           scratch.planes, then);
    } else {
      convolve(s.forward, examples, from, operands, count, result, scratch.terms, then);
    }
  }

  // to [rows * cols, out] = the product with a weight of rows of output pixels, counted from those
  // of the first image on; none of them reads outside.
  void forward_rows(const T* x, const T* weight, int64_t first, int rows, T* to) const {
    Images<const T> from{x, in.height, in.width, in.channels};
    const int64_t step = int64_t(s.forward.scale[1]) * in.channels;
    for (int64_t row = first; row < first + rows; ++row) {
      from.data = x + row / s.rows * in.size();
      for (int col = 0; col < s.cols; col += kTileRows) {
        const int live = s.cols - col < kTileRows ? s.cols - col : kTileRows;
        const int found = add_terms(s.forward, from, weight, s.out, int(row % s.rows), col,
                                    scratch.terms);
        multiply<T>({scratch.terms, found, 0, step, s.out, to, s.out, false}, live);
        to += int64_t(live) * s.out;
      }
    }
  }
  // weight [depth, out] += these rows' part in its gradient; they are of one image.
  void add_rows(const T* x, int64_t first, int rows, const T* derivative, T* weight) const {
    const Grid& grid = s.forward;
    const int64_t line = int64_t(in.width) * in.channels;
    const T* const top = x + first / s.rows * in.size() + first % s.rows * grid.scale[0] * line;
    const Pairs pairs{{1, rows, s.cols},
                      {0, grid.scale[0] * line, int64_t(grid.scale[1]) * in.channels},
                      {0, int64_t(s.cols) * s.out, s.out}};
    for (const Run *run = grid.runs.data(), *end = run + grid.runs.size(); run < end; ++run) {
      const int depth = run->count * in.channels;
      outer(pairs, top + run->row * line + int64_t(run->col) * in.channels, depth, derivative,
            s.out, weight);
      weight += int64_t(depth) * s.out;
    }
  }

  // to [examples, height, width, in] = the adjoint of derivatives by the output.
  void backward(const Operand<T>* operands, int count, int64_t examples, T* to) const {
    const Images<const T> from{nullptr, out.height, out.width, out.channels};
    const Images<T> result{to, in.height, in.width, in.channels};
    const auto nothing = [](T* const*, int) {};
    const Grid& first = s.backward.data()[0];
    if (side_back == 4) {
      return convolve_winograd<4>(first, examples, from, operands, count, result, scratch.zeros,
                                  scratch.planes, nothing);
    }
    if (side_back == 2) {
      return convolve_winograd<2>(first, examples, from, operands, count, result, scratch.zeros,
                                  scratch.planes, nothing);
    }
    Operand<T> at[2] = {operands[0], operands[count - 1]};
    for (int g = 0; g < int(s.backward.size()); ++g) {
      const Grid& grid = s.backward.data()[g];
      convolve(grid, examples, from, at, count, result, scratch.terms, nothing);
      for (Operand<T>& operand : at) operand.weight += int64_t(grid.taps.size()) * size();
    }
  }

  // The gradient of the weight, in parts: `start`, then `add` any times, then `finish`. `sums` is
  // scratch in between.
  void start(T* sums) const {
    if (side_weight > 0) conv::clear(sums, planes_of(side_weight) * size());
  }
  void add(const T* x, const T* derivative, int64_t examples, T* sums, T* gradient) const {
    const Images<const T> from{x, in.height, in.width, in.channels};
    const Images<const T> by{derivative, out.height, out.width, out.channels};
    if (side_weight == 4) {
      add_planes<4>(s.forward, examples, from, by, scratch.zeros, sums, scratch.planes);
    } else if (side_weight == 2) {
      add_planes<2>(s.forward, examples, from, by, scratch.zeros, sums, scratch.planes);
    } else if (in.channels < kFewestRows) {
      convolve_weight_by_rows(s.forward, examples, from, by, gradient, scratch.panel);
    } else {
      convolve_weight(s.forward, examples, from, by, gradient);
    }
  }
  void finish(const T* sums, T* gradient) const {
    if (side_weight == 4) add_weight_back<4>(sums, size(), gradient);
    if (side_weight == 2) add_weight_back<2>(sums, size(), gradient);
  }

 private:
  const Shape& s;
  const Scratch<T> scratch;
  const Images<const T> in, out;
  // Of Winograd's tiles, in the weight's gradient, forward and backward; 0: direct.
  const int side_weight, side, side_back;

  int64_t size() const { return int64_t(s.in) * s.out; }
  static int tile_side(const Grid& grid, int channels, int64_t examples) {
    if (!fits_winograd(grid, channels, lanes<T>)) return 0;
    return fastmeta::conv::tile_side(grid.rows, grid.cols, examples);
  }
  const T* transformed(int of_tiles, const T* weight, T* buffer) const {
    if (of_tiles == 0) return weight;
    if (of_tiles == 4) transform_weight<4>(weight, size(), buffer);
    if (of_tiles == 2) transform_weight<2>(weight, size(), buffer);
    return buffer;
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
