// Winograd's F(2 x 2, 3 x 3): an output tile of 2 x 2 by 16 products where the direct way takes 36.
// Lavin and Gray (2016), Fast algorithms for convolutional neural networks.
#pragma once

#include "direct.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::kPlanes;

constexpr int kTiles = fastmeta::conv::kMostTiles / kTileRows * kTileRows;  // at a time
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

// Between the planes of tiles; no multiple of 4 KiB for any count of channels.
constexpr int64_t plane_size(int channels) {
  return int64_t(kTiles) * channels + fastmeta::conv::kPlaneGap;
}

// The four output pixels and the sixteen input pixels of a tile.
struct Tile {
  int64_t example;
  int row, col;
};

class Tiles {
 public:
  explicit Tiles(const Grid& grid)
      : grid_(grid), rows_((grid.rows + 1) / 2), cols_((grid.cols + 1) / 2) {}
  int64_t of(int64_t examples) const { return examples * rows_ * cols_; }
  Tile at(int64_t index) const {
    return {index / (rows_ * cols_), int(index / cols_ % rows_) * 2, int(index % cols_) * 2};
  }
  // at[16]: where each input pixel lies, or zeros.
  template <class T>
  void inputs(const Tile& tile, const Images<const T>& in, const T* zeros, const T** at) const {
    const int top = tile.row + grid_.origin[0] + grid_.runs.data()->row;
    const int left = tile.col + grid_.origin[1] + grid_.runs.data()->col;
    const T* const image = in.data + tile.example * in.height * in.width * in.channels;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int y = top + i, x = left + j;
        const bool inside = y >= 0 && y < in.height && x >= 0 && x < in.width;
        at[4 * i + j] = inside ? image + (int64_t(y) * in.width + x) * in.channels : zeros;
      }
    }
  }
  // at[4]: where each output pixel lies, or null.
  template <class T>
  void outputs(const Tile& tile, T* data, int channels, T** at) const {
    T* const image = data + tile.example * grid_.rows * grid_.cols * channels;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int y = tile.row + i, x = tile.col + j;
        const bool inside = y < grid_.rows && x < grid_.cols;
        at[2 * i + j] = inside ? image + (int64_t(y) * grid_.cols + x) * channels : nullptr;
      }
    }
  }

 private:
  const Grid& grid_;
  const int rows_, cols_;
};

// planes [16][tiles, channels] = B' d B of inputs
template <class T>
void transform_inputs(const Tiles& tiles, const Images<const T>& in, const T* zeros, int64_t first,
                      int live, T* planes) {
  const int64_t plane = plane_size(in.channels);
  for (int t = 0; t < live; ++t) {
    const T* at[16];
    tiles.inputs(tiles.at(first + t), in, zeros, at);
    for (int c = 0; c < in.channels; c += lanes<T>) {
      // What is new in the tile after the next; the processor does not see it coming by itself.
      constexpr int kNew[] = {10, 11, 14, 15};
      for (int pixel : kNew) __builtin_prefetch(at[pixel] + 4 * in.channels + c);
      Num<T> d[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {  // B' d
        const Num<T> d0 = load(at[j] + c), d1 = load(at[4 + j] + c), d2 = load(at[8 + j] + c),
                     d3 = load(at[12 + j] + c);
        d[0][j] = d0 - d2, d[1][j] = d1 + d2, d[2][j] = d2 - d1, d[3][j] = d1 - d3;
      }
      T* const to = planes + int64_t(t) * in.channels + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(to + (4 * i + 0) * plane, d[i][0] - d[i][2]);
        store(to + (4 * i + 1) * plane, d[i][1] + d[i][2]);
        store(to + (4 * i + 2) * plane, d[i][2] - d[i][1]);
        store(to + (4 * i + 3) * plane, d[i][1] - d[i][3]);
      }
    }
  }
}

// The outputs A' m A of a tile; `at` as Tiles::outputs gives it.
template <class T>
void transform_outputs(const T* planes, int64_t plane, int channels, T* const* at) {
  for (int c = 0; c < channels; c += lanes<T>) {
    Num<T> half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Num<T> m0 = load(planes + j * plane + c), m1 = load(planes + (4 + j) * plane + c),
                   m2 = load(planes + (8 + j) * plane + c), m3 = load(planes + (12 + j) * plane + c);
      half[0][j] = m0 + m1 + m2, half[1][j] = m1 - m2 - m3;
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Num<T>* const m = half[i];
      if (at[2 * i] != nullptr) store(at[2 * i] + c, m[0] + m[1] + m[2]);
      if (at[2 * i + 1] != nullptr) store(at[2 * i + 1] + c, m[1] - m[2] - m[3]);
    }
  }
}

// planes [16][tiles, channels] = A e A' of derivatives by the outputs
template <class T>
void transform_derivatives(const Tiles& tiles, const T* derivative, int channels, const T* zeros,
                           int64_t first, int live, T* planes) {
  const int64_t plane = plane_size(channels);
  for (int t = 0; t < live; ++t) {
    const T* at[4];
    tiles.outputs(tiles.at(first + t), derivative, channels, at);
    for (const T*& pixel : at) pixel = pixel == nullptr ? zeros : pixel;
    for (int c = 0; c < channels; c += lanes<T>) {
      for (const T* pixel : at) __builtin_prefetch(pixel + 4 * channels + c);
      Num<T> e[4][2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Num<T> y0 = load(at[j] + c), y1 = load(at[2 + j] + c);
        e[0][j] = y0, e[1][j] = y0 + y1, e[2][j] = y0 - y1, e[3][j] = -y1;
      }
      T* const to = planes + int64_t(t) * channels + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(to + (4 * i + 0) * plane, e[i][0]);
        store(to + (4 * i + 1) * plane, e[i][0] + e[i][1]);
        store(to + (4 * i + 2) * plane, e[i][0] - e[i][1]);
        store(to + (4 * i + 3) * plane, -e[i][1]);
      }
    }
  }
}

// [16][size] = G w G' of a weight [9][size]
template <class T>
void transform_weight(const T* weight, int64_t size, T* planes) {
  for (int64_t k = 0; k < size; k += lanes<T>) {
    Num<T> g[4][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const Num<T> w0 = load(weight + j * size + k), w1 = load(weight + (3 + j) * size + k),
                   w2 = load(weight + (6 + j) * size + k);
      const Num<T> outer = T(0.5) * (w0 + w2), inner = T(0.5) * w1;
      g[0][j] = w0, g[1][j] = outer + inner, g[2][j] = outer - inner, g[3][j] = w2;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Num<T> outer = T(0.5) * (g[i][0] + g[i][2]), inner = T(0.5) * g[i][1];
      T* const to = planes + 4 * i * size + k;
      store(to, g[i][0]);
      store(to + size, outer + inner);
      store(to + 2 * size, outer - inner);
      store(to + 3 * size, g[i][2]);
    }
  }
}

// weight [9][size] += G' u G of [16][size]
template <class T>
void add_weight_back(const T* planes, int64_t size, T* weight) {
  for (int64_t k = 0; k < size; k += lanes<T>) {
    Num<T> half[3][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Num<T> u0 = load(planes + j * size + k), u1 = load(planes + (4 + j) * size + k),
                   u2 = load(planes + (8 + j) * size + k), u3 = load(planes + (12 + j) * size + k);
      half[0][j] = u0 + T(0.5) * (u1 + u2), half[1][j] = T(0.5) * (u1 - u2);
      half[2][j] = T(0.5) * (u1 + u2) + u3;
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const Num<T>* const u = half[i];
      T* const to = weight + 3 * i * size + k;
      store(to, load(to) + u[0] + T(0.5) * (u[1] + u[2]));
      store(to + size, load(to + size) + T(0.5) * (u[1] - u[2]));
      store(to + 2 * size, load(to + 2 * size) + T(0.5) * (u[1] + u[2]) + u[3]);
    }
  }
}

// As `convolve`, with weights that transform_weight made. `scratch`: two sets of planes.
template <class T, class Then>
void convolve_winograd(const Grid& grid, int64_t examples, Images<const T> in,
                       const Operand<T>* operands, int count, Images<T> out, const T* zeros,
                       T* scratch, Then then) {
  const Tiles tiles(grid);
  const int depth = in.channels, cols = out.channels;
  const int64_t all = tiles.of(examples), in_plane = plane_size(depth), plane = plane_size(cols);
  T *const inputs = scratch, *const products = scratch + kPlanes * in_plane;
  for (int64_t first = 0; first < all; first += kTiles) {
    const int live = all - first < kTiles ? int(all - first) : kTiles;
    for (int o = 0; o < count; ++o) {
      in.data = operands[o].images;
      transform_inputs(tiles, in, zeros, first, live, inputs);
      for (int p = 0; p < kPlanes; ++p) {
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
      T* at[4];
      tiles.outputs(tiles.at(first + t), out.data, cols, at);
      transform_outputs(products + int64_t(t) * cols, plane, cols, at);
      for (T* pixel : at) {
        if (pixel != nullptr) rows[found++] = pixel;
      }
      if (found > 12 || t + 1 == live) {
        then(rows, found);
        found = 0;
      }
    }
  }
}

// planes [16][depth, cols] += what add_weight_back makes the gradient of the weight of.
template <class T>
void add_planes(const Grid& grid, int64_t examples, const Images<const T>& in,
                const Images<const T>& derivative, const T* zeros, T* planes, T* scratch) {
  const Tiles tiles(grid);
  const int depth = in.channels, cols = derivative.channels;
  const int64_t all = tiles.of(examples), in_plane = plane_size(depth), plane = plane_size(cols);
  T *const inputs = scratch, *const derivatives = scratch + kPlanes * in_plane;
  for (int64_t first = 0; first < all; first += kTiles) {
    const int live = all - first < kTiles ? int(all - first) : kTiles;
    transform_inputs(tiles, in, zeros, first, live, inputs);
    transform_derivatives(tiles, derivative.data, cols, zeros, first, live, derivatives);
    for (int p = 0; p < kPlanes; ++p) {
      outer({{1, 1, live}, {0, 0, depth}, {0, 0, cols}}, inputs + p * in_plane, depth,
            derivatives + p * plane, cols, planes + int64_t(p) * depth * cols);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
