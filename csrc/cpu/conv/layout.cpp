// Where everything lies, and what follows from who reads whom.

#include "layout.h"

#include <algorithm>

namespace fastmeta::conv {
namespace {

constexpr int64_t kLine = 16;       // numbers; everything begins at a multiple
constexpr int64_t kStrip = 1 << 13;  // numbers of a product that stay in the first cache
constexpr int64_t kPixelsPerElement = 4;  // of patches: so many pixels at least for each element
constexpr int kNoFrame[2] = {0, 0};

int filled_up(int count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

int taps_of(const Block& b) { return b.kernel[0] * b.kernel[1]; }

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
  bool curve;          // an expression's curvature
};

Kept keep(Taker& take, const Block& b, const Shape& shape, int64_t examples, Keeping keeping) {
  const int64_t product = examples * shape.product_size();
  const int64_t value = examples * shape.out_pixels() * shape.out;
  const bool deltas = keeping.deltas;
  Kept kept{};
  kept.product = keeping.product ? take(product) : -1;
  kept.value = take(value);
  kept.delta = deltas ? take(value) : kept.value;
  kept.slope = b.program ? take(value) : -1;
  kept.curve = b.program && keeping.curve ? take(value) : -1;
  kept.code = b.choice ? take(value) : -1;
  kept.output = b.mean ? take(examples * shape.out) : kept.value;
  kept.output_delta = !b.mean ? kept.delta : deltas ? take(examples * shape.out) : kept.output;
  kept.product_delta = keeping.product_delta ? take(product) : -1;
  kept.statistics = take(4 * shape.out);
  return kept;
}

Moving move(Taker& take, const Block& b, const Shape& shape, int64_t examples, bool product) {
  const Kept kept = keep(take, b, shape, examples, {true, product, false, true});
  return {kept.product, kept.value, kept.output, kept.delta, kept.output_delta, kept.curve,
          kept.statistics};
}

// The block that goes by patches of the data: the deepest of those whose patches are small.
// Where hardly more pixels are than these, batch statistics leave a weight's gradient hardly anything
// of the patches' covariance, and its digits with it.
int patched_block(const Network& n) {
  const int64_t examples = n.query == 0 ? n.support : n.steps == 0 ? n.query
                                                     : std::min(n.support, n.query);
  int found = kNone, deepest = 0;
  for (int l = 0; l < int(n.blocks.size()); ++l) {
    const Block& b = n.blocks[l];
    const int depth = taps_of(b) * b.channels;
    if (b.from != kData || b.plus != kNone || depth > kShallow || depth <= deepest) continue;
    const Shape shape = shape_of(b, b.channels, kNoFrame, 1);
    if (b.norm == Norm::batch && examples * shape.pixels() < kPixelsPerElement * depth) continue;
    found = l, deepest = depth;
  }
  return found;
}

// How many blocks there are in front of which nothing adapts, and of which the others read the
// last one's output alone.
int longest_body(const Network& n) {
  if (n.per_step_support) return 0;  // each step has inputs of its own
  const int depth = int(n.blocks.size());
  int body = 0;
  for (int end = 1; end < depth && !adapts(n.blocks[end - 1]); ++end) {
    const bool sole = std::all_of(n.blocks.begin() + end, n.blocks.end(), [=](const Block& b) {
      return b.from >= end - 1 && (b.plus == kNone || b.plus >= end - 1);
    });
    if (sole) body = end;
  }
  return body;
}

// Whether batch statistics take away what each channel of the data adds to all products: where
// no zeros are read from outside of the frame, which lies as low as the data then.
bool centres(const Network& n, const Layout& layout) {
  return layout.patched != kNone &&
         std::all_of(n.blocks.begin(), n.blocks.end(), [&](const Block& b) {
           const bool inside =
               b.padding[0] <= layout.frame[0] && b.padding[1] <= layout.frame[1];
           return b.from != kData || (b.norm == Norm::batch && inside);
         });
}

// Derivatives are written by the last reader, which comes first on the way back, and added to by
// the others. Those by the body's output are sums over the steps. Returns how many read each block.
std::vector<int> connect(const Network& n, Layout& layout) {
  std::vector<int> readers(n.blocks.size());
  const auto read = [&](int source) {
    return source >= 0 && (readers[source]++ > 0 || source == layout.body - 1);
  };
  for (int l = int(n.blocks.size()) - 1; l >= 0; --l) {
    const Block& b = n.blocks[l];
    Shape& shape = layout.shapes[l];
    shape.compared = shape.compared || b.window[0] * b.window[1] > 1;
    shape.plus_adds = read(b.plus);
    shape.from_adds = read(b.from);
    if (b.plus != kNone && shape.compared) layout.shapes[b.plus].compared = true;
  }
  return readers;
}

}  // namespace

bool learns_hyperparameters(const Network& n) {
  return n.learned_rates || n.rule.learns[0] || n.rule.learns[1];
}

// What a rule makes of the parameters themselves stays differentiated.
bool sweeps(const Network& n) {
  return n.differentiate && n.steps > 0 &&
         (!n.first_order || learns_hyperparameters(n) || n.rule.decays);
}

Layout lay_out(const Network& n, int lanes) {
  Layout layout{};
  const int depth = int(n.blocks.size());
  const Block& first = n.blocks.front();
  layout.patched = patched_block(n);
  const bool by_patches = layout.patched != kNone;
  for (int axis = 0; by_patches && axis < 2; ++axis) {
    layout.frame[axis] = n.blocks[layout.patched].padding[axis];
  }
  layout.centres = centres(n, layout);
  int64_t widest = 0, longest = 0, largest = 0, inputs = 0, planes = 0, runs = 0, image_size = 0;
  for (int l = 0; l < depth; ++l) {
    const Block& b = n.blocks[l];
    const bool of_data = b.from == kData;
    const int in = of_data ? b.channels : layout.shapes[b.from].out;
    Shape shape = shape_of(b, in, of_data ? layout.frame : kNoFrame, lanes);
    const int64_t sizes[kTensors] = {int64_t(shape.depth()) * shape.out, shape.out, shape.out,
                                     shape.out};
    for (int i = 0; i < kTensors; ++i) {
      shape.of[i] = layout.block;
      if (b.has[i]) layout.block += (sizes[i] + kLine - 1) / kLine * kLine;
    }
    runs = std::max<int64_t>(runs, shape.forward.runs.size());
    for (const Grid& grid : shape.backward) runs = std::max<int64_t>(runs, grid.runs.size());
    image_size = std::max({image_size, shape.input_size(), shape.product_size()});
    widest = std::max<int64_t>(widest, std::max(shape.in, shape.out));
    longest = std::max<int64_t>(longest, shape.depth());
    if (l != layout.patched) largest = std::max(largest, shape.product_size());
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
  layout.body = longest_body(n);
  const std::vector<int> readers = connect(n, layout);

  const Shape& outermost = layout.shapes[by_patches ? layout.patched : 0];
  if (by_patches) {
    for (const Run& run : outermost.forward.runs) {
      const int span = (run.col + run.count) * outermost.in;
      layout.patch_pitch = std::max(layout.patch_pitch, filled_up(span, lanes));
    }
    const int window = n.blocks[layout.patched].window[0];
    const int64_t rows = kStrip / (int64_t(outermost.cols) * outermost.out);
    layout.strip_rows = int(std::max<int64_t>(1, rows / window)) * window;
  }

  Taker take(layout);
  const bool second = sweeps(n) && !n.first_order;
  layout.steps_kept = second ? n.steps : 1;
  layout.sets_kept = n.per_step_support ? layout.steps_kept : 1;
  layout.weights_kept = sweeps(n) ? n.steps : 1;
  // SGD's pullback looks at neither gradient nor buffer, that of clipping at the gradient.
  const bool looks = sweeps(n) && (n.rule.kind != RuleKind::sgd || learns_hyperparameters(n));
  layout.states_kept = looks ? n.steps : 1;
  layout.gradients_kept = looks || (sweeps(n) && n.rule.clips) ? n.steps : 1;
  layout.weights = take(layout.block * layout.weights_kept);
  layout.gradient = take(layout.block * layout.gradients_kept);
  layout.lambda = take(layout.block);
  layout.vector = take(layout.block);
  layout.anchor = take(layout.block);
  for (int j = 0; !is_plain(n.rule) && j < states_of(n.rule); ++j) {
    layout.states[j] = take(layout.block * layout.states_kept);
    layout.cotangents[j] = take(layout.block);
  }
  layout.clips = take(n.rule.clips ? n.steps : 0);
  for (int i = 0; i < 2; ++i) {
    layout.transposed[i] = take(inputs);
    layout.prepared[i] = take(planes);
  }
  layout.weight_sums = take(planes);
  const int64_t image = int64_t(first.channels) * (first.height + 2 * layout.frame[0]) *
                        (first.width + 2 * layout.frame[1]);
  layout.support_size = (image * n.support + kLine - 1) / kLine * kLine;
  layout.support_x = take(layout.support_size * layout.sets_kept);
  layout.query_x = take(image * n.query);
  const auto patches = [&](Kept& kept, int64_t measured, int64_t examples) {
    if (!by_patches) return;
    if (kept.code < 0) kept.code = take(examples * outermost.out_pixels() * outermost.out);
    kept.measured = measured;
    kept.patch_sums = take(int64_t(outermost.depth()) * outermost.out);
  };
  const int64_t measures =
      by_patches ? int64_t(outermost.depth()) * (1 + outermost.depth()) : 0;
  constexpr int64_t kOfDouble = 2;  // numbers that hold one
  layout.support_measured = take(kOfDouble * measures);
  layout.query_measured = take(kOfDouble * measures);
  for (int k = 0; k < layout.steps_kept; ++k) {
    if (k > 0 && layout.sets_kept > 1) layout.support_measured = take(kOfDouble * measures);
    for (int l = 0; l < depth; ++l) {
      if (k > 0 && l < layout.body) {  // which is run once
        layout.support.push_back(layout.support[l]);
        continue;
      }
      layout.support.push_back(keep(take, n.blocks[l], layout.shapes[l], n.support,
                                    {true, l != layout.patched,
                                     second && n.blocks[l].from != kData && l >= layout.body,
                                     second && l >= layout.body}));
      if (l == layout.patched) patches(layout.support.back(), layout.support_measured, n.support);
    }
  }
  for (int l = 0; l < depth; ++l) {
    // Where several read a value, it is read again when the first of them has given a derivative;
    // where the body ends, the steps add up derivatives.
    layout.query.push_back(keep(take, n.blocks[l], layout.shapes[l], n.query,
                                {readers[l] > 1 || l + 1 == layout.body, l != layout.patched,
                                 false, false}));
    if (l == layout.patched) patches(layout.query.back(), layout.query_measured, n.query);
  }
  for (int l = 0; second && l < depth; ++l) {
    layout.moving.push_back(l < layout.body ? Moving{}
                                            : move(take, n.blocks[l], layout.shapes[l], n.support,
                                                   l != layout.patched));
  }
  int64_t part = 0;
  for (const Shape& s : layout.shapes) {
    if (!s.from_adds) continue;
    const int64_t images = std::max<int64_t>(1, kChunk / s.product_size());
    part = std::max(part, std::min<int64_t>(images, std::max(n.support, n.query)) * s.input_size());
  }
  layout.part = take(part);
  int64_t chosen = 0;
  for (int l = 0; l < depth; ++l) {
    if (n.blocks[l].choice && l != layout.patched) {
      chosen = std::max(chosen, std::max(kChunk, layout.shapes[l].product_size()));
    }
  }
  layout.product_delta = take(largest * n.support);
  // The last strip takes what rows are left of no whole window.
  const int window = n.blocks[by_patches ? layout.patched : 0].window[0];
  const int64_t strip = (layout.strip_rows + window) * int64_t(outermost.cols);
  layout.strip = take(by_patches ? strip * outermost.out : 0);
  layout.arguments = take(chosen);
  layout.choices = take(std::max(chosen, by_patches ? strip * outermost.out : 0));
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
