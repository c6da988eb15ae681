// 3 x 3 convolutions of stride 1 by Winograd's transforms: a tile of 2 x 2 outputs by 16 products
// where the direct way takes 36, one of 4 x 4 by 36 where that takes 144.
#pragma once

#include "direct.h"
#include "winograd_rules.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::planes_of;

constexpr int kSmallestSide = 7;

// Whether a grid is a 3 x 3 convolution of stride 1 that is large enough.
inline bool fits_winograd(const Grid& grid, int channels, int lanes) {
  if (grid.runs.size() != 3 || channels % lanes != 0 || channels < kFewestRows) return false;
  const Run* const runs = grid.runs.data();
  for (int i = 0; i < 3; ++i) {
    if (runs[i].count != 3 || runs[i].col != runs[0].col || runs[i].row != runs[0].row + i) {
      return false;
    }
  }
  return grid.step[0] == 1 && grid.step[1] == 1 && grid.scale[0] == 1 && grid.scale[1] == 1 &&
         grid.rows >= kSmallestSide && grid.cols >= kSmallestSide;
}

// Tiles of M x M output pixels, which read S x S of the input.
template <int M>
class Tiles {
 public:
  static constexpr int S = M + 2;
  Tiles(const Grid& grid, int in, int out)
      : at_a_time(tiles_of(in > out ? in : out)),
        grid_(grid), rows_((grid.rows + M - 1) / M), cols_((grid.cols + M - 1) / M) {}
  const int at_a_time;
  // Between the planes of so many; seldom a multiple of 4 KiB.
  int64_t plane(int channels) const {
    return int64_t(at_a_time) * channels + fastmeta::conv::kPlaneGap;
  }
  int64_t of(int64_t examples) const { return examples * rows_ * cols_; }
  // at[S * S]: where each input pixel of a tile lies, or zeros.
  template <class T>
  void inputs(int64_t index, const Images<const T>& in, const T* zeros, const T** at) const {
    const Tile tile = tile_at(index);
    const int top = tile.row + grid_.origin[0] + grid_.runs.data()->row;
    const int left = tile.col + grid_.origin[1] + grid_.runs.data()->col;
    const T* const image = in.data + tile.example * in.size();
    for (int i = 0; i < S; ++i) {
      const int y = top + i;
      const bool inside = y >= 0 && y < in.height;
      const T* const row = image + int64_t(inside ? y : 0) * in.width * in.channels;
      for (int j = 0; j < S; ++j) {
        const int x = left + j;
        at[S * i + j] = inside && x >= 0 && x < in.width ? row + int64_t(x) * in.channels : zeros;
      }
    }
  }
  // at[M * M]: where each output pixel lies, or null.
  template <class T>
  void outputs(int64_t index, T* data, int channels, T** at) const {
    const Tile tile = tile_at(index);
    T* const image = data + tile.example * grid_.rows * grid_.cols * channels;
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < M; ++j) {
        const int y = tile.row + i, x = tile.col + j;
        const bool inside = y < grid_.rows && x < grid_.cols;
        at[M * i + j] = inside ? image + (int64_t(y) * grid_.cols + x) * channels : nullptr;
      }
    }
  }

 private:
  struct Tile {
    int64_t example;
    int row, col;
  };
  const Grid& grid_;
  const int rows_, cols_;

  static int tiles_of(int channels) {
    const int rows = fastmeta::conv::kPlane / channels / kTileRows * kTileRows;
    return rows > kTileRows ? rows : kTileRows;
  }
  Tile tile_at(int64_t index) const {
    return {index / (rows_ * cols_), int(index / cols_ % rows_) * M, int(index % cols_) * M};
  }
};

// planes [S * S][tiles, channels] = B' d B of inputs
template <int M, class T>
void transform_inputs(const Tiles<M>& tiles, const Images<const T>& in, const T* zeros,
                      int64_t first, int live, T* planes) {
  constexpr int S = M + 2;
  const int64_t plane = tiles.plane(in.channels);
  for (int t = 0; t < live; ++t) {
    const T* at[S * S];
    tiles.inputs(first + t, in, zeros, at);
    for (int c = 0; c < in.channels; c += lanes<T>) {
      // What is new in a tile soon to come; the processor does not see it by itself.
      for (int i = 2; i < S; ++i) {
        for (int j = 2; j < S; ++j) __builtin_prefetch(at[S * i + j] + 4 * in.channels + c);
      }
      T* const to = planes + int64_t(t) * in.channels + c;
      over_both<Rules<T, M>::inputs, T, S, S>(
          [&](int i, int j) { return load(at[S * i + j] + c); },
          [&](int i, int j, Num<T> made) { store(to + (S * i + j) * plane, made); });
    }
  }
}

// The outputs A' m A of a tile; `at` as Tiles::outputs gives it.
template <int M, class T>
void transform_outputs(const T* planes, int64_t plane, int channels, T* const* at) {
  constexpr int S = M + 2;
  for (int c = 0; c < channels; c += lanes<T>) {
    over_both<Rules<T, M>::outputs, T, S, M>(
        [&](int i, int j) { return load(planes + (S * i + j) * plane + c); },
        [&](int i, int j, Num<T> made) {
          if (at[M * i + j] != nullptr) store(at[M * i + j] + c, made);
        });
  }
}

// planes [S * S][tiles, channels] = A e A' of derivatives by the outputs
template <int M, class T>
void transform_derivatives(const Tiles<M>& tiles, const T* derivative, int channels, const T* zeros,
                           int64_t first, int live, T* planes) {
  constexpr int S = M + 2;
  const int64_t plane = tiles.plane(channels);
  for (int t = 0; t < live; ++t) {
    const T* at[M * M];
    tiles.outputs(first + t, derivative, channels, at);
    for (const T*& pixel : at) pixel = pixel == nullptr ? zeros : pixel;
    for (int c = 0; c < channels; c += lanes<T>) {
      for (const T* pixel : at) __builtin_prefetch(pixel + 4 * channels + c);
      T* const to = planes + int64_t(t) * channels + c;
      over_both<Rules<T, M>::derivatives, T, M, S>(
          [&](int i, int j) { return load(at[M * i + j] + c); },
          [&](int i, int j, Num<T> made) { store(to + (S * i + j) * plane, made); });
    }
  }
}

// [S * S][size] = G w G' of a weight [9][size]
template <int M, class T>
void transform_weight(const T* weight, int64_t size, T* planes) {
  constexpr int S = M + 2;
  for (int64_t k = 0; k < size; k += lanes<T>) {
    over_both<Rules<T, M>::weight, T, 3, S>(
        [&](int i, int j) { return load(weight + (3 * i + j) * size + k); },
        [&](int i, int j, Num<T> made) { store(planes + (S * i + j) * size + k, made); });
  }
}

// weight [9][size] += G' u G of [S * S][size]
template <int M, class T>
void add_weight_back(const T* planes, int64_t size, T* weight) {
  constexpr int S = M + 2;
  for (int64_t k = 0; k < size; k += lanes<T>) {
    over_both<Rules<T, M>::weight_back, T, S, 3>(
        [&](int i, int j) { return load(planes + (S * i + j) * size + k); },
        [&](int i, int j, Num<T> made) {
          T* const to = weight + (3 * i + j) * size + k;
          store(to, load(to) + made);
        });
  }
}

// As `convolve`, with weights that transform_weight made. `scratch`: two sets of planes.
template <int M, class T, class Then>
void convolve_winograd(const Grid& grid, int64_t examples, Images<const T> in,
                       const Operand<T>* operands, int count, Images<T> out, const T* zeros,
                       T* scratch, Then then) {
  const int depth = in.channels, cols = out.channels;
  const Tiles<M> tiles(grid, depth, cols);
  const int64_t all = tiles.of(examples), in_plane = tiles.plane(depth), plane = tiles.plane(cols);
  cpu::Budget& budget = cpu::budget();
  T *const inputs = scratch, *const products = scratch + planes_of(M) * in_plane;
  for (int64_t first = 0; first < all; first += tiles.at_a_time) {
    const int live = all - first < tiles.at_a_time ? int(all - first) : tiles.at_a_time;
    for (int o = 0; o < count; ++o) {
      in.data = operands[o].images;
      transform_inputs(tiles, in, zeros, first, live, inputs);
      for (int p = 0; p < planes_of(M); ++p) {
        const Term<T> term{inputs + p * in_plane, operands[o].weight + int64_t(p) * depth * cols,
                           depth};
        T* const to = products + p * plane;
        for (int t = 0; t < live; t += kTileRows) {
          const int few = live - t < kTileRows ? live - t : kTileRows;
          multiply<T>({&term, 1, int64_t(t) * depth, depth, cols, to + int64_t(t) * cols, cols,
                       o > 0},
                      few);
        }
      }
    }
    T* rows[16];
    int found = 0;
    for (int t = 0; t < live; ++t) {
      T* at[M * M];
      tiles.outputs(first + t, out.data, cols, at);
      transform_outputs<M>(products + int64_t(t) * cols, plane, cols, at);
      for (T* pixel : at) {
        if (pixel != nullptr) rows[found++] = pixel;
      }
      if (found > 16 - M * M || t + 1 == live) {
        then(rows, found);
        found = 0;
      }
    }
    spend(budget, int64_t(count) * planes_of(M) * live * depth * cols / lanes<T>);
  }
}

// planes [S * S][depth, cols] += what add_weight_back makes the gradient of the weight of.
template <int M, class T>
void add_planes(const Grid& grid, int64_t examples, const Images<const T>& in,
                const Images<const T>& derivative, const T* zeros, T* planes, T* scratch) {
  const int depth = in.channels, cols = derivative.channels;
  const Tiles<M> tiles(grid, depth, cols);
  const int64_t all = tiles.of(examples), in_plane = tiles.plane(depth), plane = tiles.plane(cols);
  cpu::Budget& budget = cpu::budget();
  T *const inputs = scratch, *const derivatives = scratch + planes_of(M) * in_plane;
  for (int64_t first = 0; first < all; first += tiles.at_a_time) {
    const int live = all - first < tiles.at_a_time ? int(all - first) : tiles.at_a_time;
    transform_inputs(tiles, in, zeros, first, live, inputs);
    transform_derivatives(tiles, derivative.data, cols, zeros, first, live, derivatives);
    for (int p = 0; p < planes_of(M); ++p) {
      outer({{1, 1, live}, {0, 0, depth}, {0, 0, cols}}, inputs + p * in_plane, depth,
            derivatives + p * plane, cols, planes + int64_t(p) * depth * cols);
    }
    spend(budget, int64_t(planes_of(M)) * live * depth * cols / lanes<T>);
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
