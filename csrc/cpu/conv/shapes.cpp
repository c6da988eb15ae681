// Sizes, and reading patterns of convolutions and their adjoints.

#include "layout.h"

namespace fastmeta::conv {
namespace {

// Joins taps that read pixels side by side.
void add_tap(Grid& grid, int row, int col, int tap) {
  if (!grid.runs.empty()) {
    Run& last = grid.runs.back();
    if (last.row == row && last.col + last.count == col) {
      ++last.count;
      grid.taps.push_back(tap);
      return;
    }
  }
  grid.runs.push_back({row, col, 1});
  grid.taps.push_back(tap);
}

Grid forward_grid(const Block& b, const Shape& shape, const int* frame) {
  Grid grid{shape.rows, shape.cols, {0, 0}, {1, 1},
            {frame[0] - b.padding[0], frame[1] - b.padding[1]}, {b.stride[0], b.stride[1]}, {}, {}};
  for (int i = 0; i < b.kernel[0]; ++i) {
    for (int j = 0; j < b.kernel[1]; ++j) {
      add_tap(grid, i * b.dilation[0], j * b.dilation[1], i * b.kernel[1] + j);
    }
  }
  return grid;
}

// Taps of one axis by which an input pixel `phase` steps into a period of the stride is read, the
// output pixel that reads it first.
struct Read {
  int tap, from;
};
std::vector<Read> reads(const Block& b, int axis, int phase) {
  std::vector<Read> found;
  for (int tap = b.kernel[axis] - 1; tap >= 0; --tap) {
    const int ahead = phase + b.padding[axis] - tap * b.dilation[axis];
    if (ahead % b.stride[axis] == 0) found.push_back({tap, ahead / b.stride[axis]});
  }
  return found;
}

// The adjoint with a stride falls into as many grids as the stride has phases, none of which wastes
// a product on a zero between pixels.
std::vector<Grid> backward_grids(const Block& b) {
  std::vector<Grid> grids;
  for (int y = 0; y < b.stride[0] && y < b.height; ++y) {
    for (int x = 0; x < b.stride[1] && x < b.width; ++x) {
      Grid grid{(b.height - y + b.stride[0] - 1) / b.stride[0],
                (b.width - x + b.stride[1] - 1) / b.stride[1],
                {y, x}, {b.stride[0], b.stride[1]}, {0, 0}, {1, 1}, {}, {}};
      for (const Read& row : reads(b, 0, y)) {
        for (const Read& col : reads(b, 1, x)) {
          add_tap(grid, row.from, col.from, row.tap * b.kernel[1] + col.tap);
        }
      }
      grids.push_back(grid);
    }
  }
  return grids;
}

}  // namespace

Shape shape_of(const Block& b, int in, const int* frame, int lanes) {
  Shape shape{};
  shape.in = in;
  shape.out = (b.filters + lanes - 1) / lanes * lanes;
  shape.height = b.height + 2 * frame[0], shape.width = b.width + 2 * frame[1];
  const auto extent = [&](int size, int axis) {
    const int reach = b.dilation[axis] * (b.kernel[axis] - 1) + 1;
    return (size + 2 * b.padding[axis] - reach) / b.stride[axis] + 1;
  };
  shape.rows = extent(b.height, 0), shape.cols = extent(b.width, 1);
  shape.out_rows = shape.rows / b.window[0], shape.out_cols = shape.cols / b.window[1];
  shape.forward = forward_grid(b, shape, frame);
  shape.backward = backward_grids(b);
  return shape;
}

}  // namespace fastmeta::conv
