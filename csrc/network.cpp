// Where each matrix of a step lies in a task's storage.

#include "network.h"

#include <algorithm>

namespace fastmeta {
namespace {

class Allocator {
 public:
  explicit Allocator(int width) : width_(width) {}

  View matrix(int rows, int cols) {
    const int stride = padded(cols);
    View view{next_, rows, cols, stride, 1};
    next_ += int64_t(rows) * stride;
    return view;
  }
  // A matrix of one column, side by side.
  View column(int rows) {
    View view{next_, rows, 1, 1, padded(rows)};
    next_ += view.col_stride;
    return view;
  }
  // From one row to the next. An odd number of vectors: at a power of two the rows of a narrow
  // strip would meet in a few sets of the cache.
  int padded(int cols) const {
    int vectors = (cols + width_ - 1) / width_;
    if (width_ > 1 && vectors > 4) vectors |= 1;
    return vectors * width_;
  }
  int64_t block(int64_t size) {
    const int64_t offset = next_;
    next_ += size;
    return offset;
  }
  int64_t size() const { return next_; }

 private:
  int width_;
  int64_t next_ = 0;
};

Sums sums(Allocator& allocate, int width) {
  return {allocate.matrix(1, width), allocate.matrix(1, width)};
}

// What a layer's norm keeps besides.
void add_norm(Allocator& allocate, const Dense& layer, const Layout::Layer& place, Trace& trace) {
  const int count = trace.value.rows;
  trace.product = allocate.matrix(count, layer.out);
  trace.product_delta = allocate.matrix(count, layer.out);
  trace.sums = sums(allocate, layer.out);
  const bool given = layer.norm == Norm::running;
  trace.mean = given ? place.mean : allocate.matrix(1, layer.out);
  trace.inverse = given ? place.inverse : allocate.matrix(1, layer.out);
}

void add_norm(Allocator& allocate, const Dense& layer, Tangent& tangent) {
  tangent.normalised = allocate.matrix(tangent.value.rows, layer.out);
  tangent.value_sums = sums(allocate, layer.out);
  tangent.delta_sums = sums(allocate, layer.out);
}

Examples examples(Allocator& allocate, const Description& network, const Layout& layout, int count,
                  int kept) {
  const Dense& last = network.layers.back();
  Examples set{allocate.matrix(count, network.layers.front().in),
               allocate.matrix(count, last.out),
               allocate.column(count),
               allocate.column(count),
               allocate.column(count),
               {},
               allocate.matrix(1, 1),
               {}};
  if (network.loss.weighted) {
    const bool of_classes = network.loss.kind == LossKind::cross_entropy;
    set.loss_weights = allocate.matrix(of_classes ? 1 : count, last.out);
  }
  for (int step = 0; step < kept; ++step) {
    for (std::size_t l = 0; l < network.layers.size(); ++l) {
      const Dense& layer = network.layers[l];
      Trace trace{};
      trace.value = trace.product = allocate.matrix(count, layer.out);
      trace.delta = trace.product_delta = allocate.matrix(count, layer.out);
      if (!follows_from_output(layer.activation)) {
        trace.slope = allocate.matrix(count, layer.out);
        trace.curve = allocate.matrix(count, layer.out);
      }
      if (layer.norm != Norm::none) add_norm(allocate, layer, layout.layers[l], trace);
      trace.softmax = trace.value;
      if (&layer == &last && layer.activation != Activation::identity) {
        trace.softmax = allocate.matrix(count, layer.out);
      }
      set.traces.push_back(trace);
    }
  }
  return set;
}

}  // namespace

Layout lay_out(const Description& network, int width) {
  Layout layout;
  Allocator allocate(width), block(width);
  layout.one = allocate.matrix(1, 1);
  layout.zero = allocate.matrix(1, 1);
  for (const Dense& layer : network.layers) {
    const bool turned = width > 1;
    const View weight =
        turned ? block.matrix(layer.in, layer.out) : block.matrix(layer.out, layer.in);
    Layout::Layer place{};
    place.of[kWeight] = weight.offset;
    place.weight_row_stride = turned ? 1 : weight.row_stride;
    place.weight_col_stride = turned ? weight.row_stride : 1;
    layout.parameters += int64_t(layer.in) * layer.out;
    for (Tensor row : kRows) {
      if (!layer.has[row]) continue;
      place.of[row] = block.matrix(1, layer.out).offset;
      layout.parameters += layer.out;
    }
    if (layer.norm == Norm::running) {
      place.mean = allocate.matrix(1, layer.out);
      place.inverse = allocate.matrix(1, layer.out);
    }
    place.one = layout.one, place.zero = layout.zero;
    layout.layers.push_back(place);
    if (turned && layout.layers.size() > 1) {
      const int64_t panel = int64_t(layer.out) * block.padded(layer.in);
      layout.scratch = std::max(layout.scratch, 2 * panel);
    }
  }
  layout.block = block.size();
  const bool reverses = network.differentiate;
  layout.thetas_kept = reverses ? network.steps + 1 : 3;
  layout.traces_kept = reverses && (!network.first_order || network.learned_rates)
                           ? std::max(1, network.steps)
                           : 1;
  layout.theta = allocate.block(layout.thetas_kept * layout.block);
  layout.support = examples(allocate, network, layout, network.support, layout.traces_kept);
  layout.query = examples(allocate, network, layout, network.query, 1);
  layout.scalar = allocate.column(1);
  if (network.elementwise_rates) layout.rate = allocate.block(layout.block);
  if (reverses) {
    layout.lambda = allocate.block(layout.block);
    layout.vector = allocate.block(layout.block);
    if (network.prox != 0) layout.anchor = allocate.block(layout.block);
    if (network.learned_rates) layout.gradient = allocate.block(layout.block);
    if (!network.first_order) {
      for (const Dense& layer : network.layers) {
        Tangent tangent{};
        tangent.value = allocate.matrix(network.support, layer.out);
        tangent.delta = allocate.matrix(network.support, layer.out);
        if (is_bent(layer.activation)) tangent.bend = allocate.matrix(network.support, layer.out);
        if (layer.norm != Norm::none) add_norm(allocate, layer, tangent);
        layout.tangents.push_back(tangent);
      }
    }
  }
  layout.scratch = allocate.block(layout.scratch);
  layout.size = allocate.size();
  return layout;
}

int64_t gradient_size(const Description& network, const Layout& layout) {
  const int64_t each = network.elementwise_rates ? layout.parameters : kTensors * layout.layers.size();
  return layout.parameters + (network.learned_rates ? network.steps * each : 0);
}

}  // namespace fastmeta
