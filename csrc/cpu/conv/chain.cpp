// Sizes, reading patterns of convolutions and their adjoints, and where everything lies.

#include "chain.h"

#include <algorithm>

namespace fastmeta::conv {
namespace {

constexpr int64_t kLine = 16;       // numbers; everything begins at a multiple
constexpr int64_t kStrip = 1 << 13;  // numbers of a product that stay in the first cache

int filled_up(int count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

int taps_of(const Block& b) { return b.kernel[0] * b.kernel[1]; }

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

Grid forward_grid(const Block& b, const Shape& shape) {
  Grid grid{shape.rows, shape.cols, {0, 0}, {1, 1}, {-b.padding[0], -b.padding[1]},
            {b.stride[0], b.stride[1]}, {}, {}};
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

Shape shape_of(const Block& b, int in, int lanes) {
  Shape shape{};
  shape.in = in;
  shape.out = filled_up(b.filters, lanes);
  const auto extent = [&](int size, int axis) {
    const int reach = b.dilation[axis] * (b.kernel[axis] - 1) + 1;
    return (size + 2 * b.padding[axis] - reach) / b.stride[axis] + 1;
  };
  shape.rows = extent(b.height, 0), shape.cols = extent(b.width, 1);
  shape.out_rows = shape.rows / b.window[0], shape.out_cols = shape.cols / b.window[1];
  shape.forward = forward_grid(b, shape);
  shape.backward = backward_grids(b);
  return shape;
}

class Taker {
 public:
  explicit Taker(Layout& layout) : layout_(layout) {}
  int64_t operator()(int64_t count) {
    const int64_t at = layout_.size;
    layout_.size += (count + kLine - 1) / kLine * kLine;
    return at;
  }

 private:
  Layout& layout_;
};

bool adapts(const Block& b) {
  return b.adapts[kWeight] || b.adapts[kBias] || b.adapts[kScale] || b.adapts[kShift];
}

struct Keeping {
  bool deltas;         // derivatives lie apart from what they are derived by: both are read again
  bool product, product_delta;
};

Kept keep(Taker& take, const Block& b, const Shape& shape, int64_t examples, Keeping keeping) {
  const int64_t product = examples * shape.pixels() * shape.out;
  const int64_t value = examples * shape.out_pixels() * shape.out;
  const bool deltas = keeping.deltas;
  Kept kept{};
  kept.product = keeping.product ? take(product) : -1;
  kept.value = take(value);
  kept.delta = deltas ? take(value) : kept.value;
  kept.output = b.mean ? take(examples * shape.out) : kept.value;
  kept.output_delta = !b.mean ? kept.delta : deltas ? take(examples * shape.out) : kept.output;
  kept.product_delta = keeping.product_delta ? take(product) : -1;
  kept.statistics = take(4 * shape.out);
  return kept;
}

Moving move(Taker& take, const Block& b, const Shape& shape, int64_t examples, bool product) {
  const Kept kept = keep(take, b, shape, examples, {true, product, false});
  return {kept.product, kept.value, kept.output, kept.delta, kept.output_delta, kept.statistics};
}

}  // namespace

bool sweeps(const Network& n) {
  return n.differentiate && n.steps > 0 && (!n.first_order || n.learned_rates);
}

Layout lay_out(const Network& n, int lanes) {
  Layout layout{};
  const int depth = int(n.blocks.size());
  int64_t widest = 0, longest = 0, largest = 0, inputs = 0, planes = 0, runs = 0, image_size = 0;
  for (int l = 0; l < depth; ++l) {
    const Block& b = n.blocks[l];
    const int in = l == 0 ? b.channels : layout.shapes[l - 1].out;
    Shape shape = shape_of(b, in, lanes);
    const bool framed = l == 0 && shape.depth() <= kShallow;
    if (framed) shape.forward.origin[0] = shape.forward.origin[1] = 0;
    const int64_t sizes[kTensors] = {int64_t(shape.depth()) * shape.out, shape.out, shape.out,
                                     shape.out};
    for (int i = 0; i < kTensors; ++i) {
      shape.of[i] = layout.block;
      if (b.has[i]) layout.block += (sizes[i] + kLine - 1) / kLine * kLine;
    }
    runs = std::max<int64_t>(runs, shape.forward.runs.size());
    for (const Grid& grid : shape.backward) runs = std::max<int64_t>(runs, grid.runs.size());
    image_size = std::max({image_size, int64_t(b.height) * b.width * shape.in,
                           int64_t(shape.pixels()) * shape.out});
    widest = std::max<int64_t>(widest, std::max(shape.in, shape.out));
    longest = std::max<int64_t>(longest, shape.depth());
    if (l > 0 || shape.depth() > kShallow) {
      largest = std::max<int64_t>(largest, int64_t(shape.pixels()) * shape.out);
    }
    inputs = std::max<int64_t>(inputs, int64_t(taps_of(b)) * filled_up(in, lanes) * shape.out);
    if (taps_of(b) == 9) {
      planes = std::max<int64_t>(planes, int64_t(kMostPlanes) * filled_up(in, lanes) * shape.out);
    }
    layout.shapes.push_back(shape);
  }
  for (int l = 0; l < depth; ++l) {
    if (n.blocks[l].norm != Norm::running) continue;
    layout.shapes[l].given = layout.block + layout.given;
    layout.given += 2 * int64_t(layout.shapes[l].out);
  }
  while (layout.body < depth - 1 && !adapts(n.blocks[layout.body])) ++layout.body;

  const Shape& outermost = layout.shapes.front();
  const bool by_patches = outermost.depth() <= kShallow;
  if (by_patches) {
    for (const Run& run : outermost.forward.runs) {
      const int span = (run.col + run.count) * outermost.in;
      layout.patch_pitch = std::max(layout.patch_pitch, filled_up(span, lanes));
    }
    const int window = n.blocks.front().window[0];
    const int64_t rows = kStrip / (int64_t(outermost.cols) * outermost.out);
    layout.strip_rows = int(std::max<int64_t>(1, rows / window)) * window;
  }

  Taker take(layout);
  const bool second = sweeps(n) && !n.first_order;
  layout.steps_kept = sweeps(n) ? n.steps : 1;
  layout.weights_kept = sweeps(n) ? n.steps : 1;
  layout.gradients_kept = n.learned_rates && sweeps(n) ? n.steps : 1;
  layout.weights = take(layout.block * layout.weights_kept);
  layout.gradient = take(layout.block * layout.gradients_kept);
  layout.lambda = take(layout.block);
  layout.vector = take(layout.block);
  layout.anchor = take(layout.block);
  for (int i = 0; i < 2; ++i) {
    layout.turned[i] = take(inputs);
    layout.prepared[i] = take(planes);
  }
  layout.weight_sums = take(planes);
  const Block& first = n.blocks.front();
  const int frame[2] = {by_patches ? first.padding[0] : 0, by_patches ? first.padding[1] : 0};
  const int64_t image = int64_t(first.channels) * (first.height + 2 * frame[0]) *
                        (first.width + 2 * frame[1]);
  layout.support_x = take(image * n.support);
  layout.query_x = take(image * n.query);
  const auto patches = [&](Kept& kept, int64_t measured, int64_t examples) {
    if (!by_patches) return;
    kept.code = take(examples * outermost.out_pixels() * outermost.out);
    kept.measured = measured;
    kept.patch_sums = take(int64_t(outermost.depth()) * outermost.out);
  };
  const int64_t measures =
      by_patches ? int64_t(outermost.depth()) * (1 + outermost.depth()) : 0;
  constexpr int64_t kOfDouble = 2;  // numbers that hold one
  layout.support_measured = take(kOfDouble * measures);
  layout.query_measured = take(kOfDouble * measures);
  for (int k = 0; k < layout.steps_kept; ++k) {
    for (int l = 0; l < depth; ++l) {
      if (k > 0 && l < layout.body) {  // which is run once
        layout.support.push_back(layout.support[l]);
        continue;
      }
      layout.support.push_back(keep(take, n.blocks[l], layout.shapes[l], n.support,
                                    {true, l > 0 || !by_patches,
                                     second && l > 0 && l >= layout.body}));
      if (l == 0) patches(layout.support.back(), layout.support_measured, n.support);
    }
  }
  for (int l = 0; l < depth; ++l) {
    // Where the body ends, the steps add up derivatives while values are read again.
    layout.query.push_back(keep(take, n.blocks[l], layout.shapes[l], n.query,
                                {l + 1 == layout.body, l > 0 || !by_patches, false}));
    if (l == 0) patches(layout.query.back(), layout.query_measured, n.query);
  }
  for (int l = 0; second && l < depth; ++l) {
    layout.moving.push_back(l < layout.body ? Moving{}
                                            : move(take, n.blocks[l], layout.shapes[l], n.support,
                                                   l > 0 || !by_patches));
  }
  if (layout.body > 0) {
    const Shape& last = layout.shapes[layout.body - 1];
    layout.border = take(int64_t(std::max(n.support, n.query)) * last.out_pixels() * last.out);
  }
  layout.product_delta = take(largest * n.support);
  // The last strip takes what rows are left of no whole window.
  const int64_t strip = (layout.strip_rows + n.blocks.front().window[0]) * int64_t(outermost.cols);
  layout.strip = take(by_patches ? strip * outermost.out : 0);
  layout.first = take(by_patches ? (1 + 4 * int64_t(outermost.depth())) * outermost.out : 0);
  // A product's last tile reads past its rows.
  layout.panel = take(std::max(kMostRows * (longest + kGap), kPanelBytes / 4));
  if (by_patches) {
    const int64_t pitch = layout.patch_pitch, behind = std::max<int64_t>(pitch, kMostRows);
    layout.patches = take(int64_t(outermost.in) * lanes + pitch * pitch + image + behind);
  }
  const int64_t plane = std::max<int64_t>(kPlane, kMostRows * widest) + kPlaneGap;
  layout.planes = take(planes > 0 ? 2 * kMostPlanes * plane : 0);
  layout.terms = take(kTermNumbers * 2 * runs);  // of two operands
  layout.pulls = take(8 * widest);
  layout.one = take(widest);
  layout.zero = take(widest);
  const int64_t classes = n.blocks.back().filters;
  const auto loss = [&](int64_t examples) { return examples * (8 * classes + 8) + classes + 64; };
  layout.support_loss = take(loss(n.support));
  layout.query_loss = take(loss(n.query));
  take(kMostBehind * image_size);
  return layout;
}

}  // namespace fastmeta::conv
