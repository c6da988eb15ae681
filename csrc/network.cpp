// Where each matrix of a step lies in a task's storage.

#include "network.h"

#include <algorithm>
#include <initializer_list>

#include "expression.h"

namespace fastmeta {
namespace {

class Allocator {
 public:
  Allocator(int width, Rows rows) : width_(width), rows_(rows) {}

  View matrix(int rows, int cols) {
    const int stride = rows_ == Rows::float4 && rows == 1 ? cols : padded(cols);
    return {block(int64_t(rows) * stride), rows, cols, stride, 1};
  }
  // A matrix of one column, side by side.
  View column(int rows) {
    const int stride = padded(rows);
    return {block(stride), rows, 1, 1, stride};
  }
  // From one row to the next.
  int padded(int cols) const {
    if (rows_ == Rows::float4) return cols < 2 ? cols : 4 * ((cols + 3) / 4 | 1);
    return rows_ == Rows::odd ? cols | 1 : fastmeta::padded(cols, width_);
  }
  int64_t block(int64_t size) {
    const int64_t offset = next_;
    next_ += rows_ == Rows::float4 ? (size + 3) / 4 * 4 : size;
    return offset;
  }
  // As long as a weight.
  int64_t like(View v) {
    const bool transposed = v.row_stride == 1 && v.col_stride > 1;
    return block(transposed ? int64_t(v.cols) * v.col_stride : int64_t(v.rows) * v.row_stride);
  }
  // Allocates from there once more, over what is there: the two are never needed together.
  void lay_over(int64_t offset) { end_ = std::max(end_, next_), next_ = offset; }
  void lay_behind() { next_ = std::max(end_, next_); }
  int64_t size() const { return next_; }

 private:
  int width_;
  Rows rows_;
  int64_t next_ = 0, end_ = 0;
};

Sums sums(Allocator& allocate, int width) {
  return {allocate.matrix(1, width), allocate.matrix(1, width)};
}

Sums column_sums(Allocator& allocate, int count) {
  return {allocate.column(count), allocate.column(count)};
}

// What a layer's norm keeps besides.
void add_norm(Allocator& allocate, const Dense& layer, const LayerPlace& place, Trace& trace) {
  const int count = trace.value.rows;
  trace.product = allocate.matrix(count, layer.out);
  trace.product_delta = allocate.matrix(count, layer.out);
  trace.sums = sums(allocate, layer.out);
  if (is_of_examples(layer.norm)) {
    trace.mean = allocate.column(count);
    trace.inverse = allocate.column(count);
    trace.of_rows = column_sums(allocate, count);
    return;
  }
  if (layer.norm == Norm::columns) {
    trace.mean = {place.zero.offset, 1, layer.out, 0, 0};
    trace.inverse = {place.one.offset, 1, layer.out, 0, 0};
    return;
  }
  const bool given = layer.norm == Norm::running;
  trace.mean = given ? place.mean : allocate.matrix(1, layer.out);
  trace.inverse = given ? place.inverse : allocate.matrix(1, layer.out);
}

void add_norm(Allocator& allocate, const Dense& layer, Tangent& tangent) {
  const int count = tangent.value.rows;
  const bool of_examples = is_of_examples(layer.norm);
  tangent.normalised = allocate.matrix(count, layer.out);
  tangent.value_sums = of_examples ? column_sums(allocate, count) : sums(allocate, layer.out);
  tangent.delta_sums = sums(allocate, layer.out);
  if (of_examples) tangent.of_rows = column_sums(allocate, count);
}

Examples examples(Allocator& allocate, const Description& network, const Loss& loss, int count,
                  int inputs, bool copies) {
  const Dense& last = network.layers.back();
  const int in = network.layers.front().in;
  Examples set{};
  set.inputs = copies ? allocate.matrix(inputs, in) : View{0, inputs, in, 0, 0};
  if (network.inputs_flow) set.of_inputs = allocate.matrix(count, in);
  if (network.inputs_flow && network.chunk > 0) set.of_inputs_before = allocate.matrix(count, in);
  if (loss.kind != LossKind::expression) set.targets = allocate.matrix(count, last.out);
  set.weights = allocate.column(count);
  set.row = allocate.column(count);
  set.second_row = allocate.column(count);
  set.mass = allocate.matrix(1, 1);
  if (loss.weighted) {
    const bool of_classes = loss.kind == LossKind::cross_entropy;
    set.loss_weights = allocate.matrix(of_classes ? 1 : count, last.out);
  }
  if (loss.programs == nullptr) return set;
  for (const LossInput& input : loss.programs->inputs) {
    const View one = input.of_examples && input.columns == 1
                         ? allocate.column(count)
                         : allocate.matrix(input.of_examples ? count : 1, input.columns);
    set.loss_inputs.push_back(one);
    if (!input.learns) continue;
    set.gradients.push_back(allocate.matrix(1, input.columns));
    set.sums.push_back(allocate.matrix(1, input.columns));
  }
  return set;
}

// Of so many passes over `count` examples, that leave what the Hessian's part needs or not.
void add_traces(Allocator& allocate, const Description& network, const Layout& layout, int count,
                int passes, bool curves, Examples& set) {
  const Dense& last = network.layers.back();
  for (int pass = 0; pass < passes; ++pass) {
    for (std::size_t l = 0; l < network.layers.size(); ++l) {
      const Dense& layer = network.layers[l];
      if (pass > 0 && int(l) < network.body) {
        set.traces.push_back(set.traces[l]);
        continue;
      }
      Trace trace{};
      trace.value = trace.product = allocate.matrix(count, layer.out);
      trace.delta = trace.product_delta = allocate.matrix(count, layer.out);
      if (!follows_from_output(layer.activation)) {
        trace.slope = allocate.matrix(count, layer.out);
        if (curves) trace.curve = allocate.matrix(count, layer.out);
      }
      if (layer.norm != Norm::none) add_norm(allocate, layer, layout.layers[l], trace);
      if (layer.masked) trace.mask = allocate.matrix(count, layer.out);
      trace.softmax = trace.value;
      if (&layer == &last && layer.activation != Activation::identity) {
        trace.softmax = allocate.matrix(count, layer.out);
      }
      set.traces.push_back(trace);
    }
  }
}

void add_tangents(Allocator& allocate, const Description& network, Layout& layout) {
  layout.tangents.resize(network.body);  // nothing moves there
  for (std::size_t l = network.body; l < network.layers.size(); ++l) {
    const Dense& layer = network.layers[l];
    const int count = network.rows(network.support);
    Tangent tangent{};
    tangent.value = allocate.matrix(count, layer.out);
    tangent.delta = allocate.matrix(count, layer.out);
    if (is_bent(layer.activation)) tangent.bend = allocate.matrix(count, layer.out);
    if (layer.norm != Norm::none) add_norm(allocate, layer, tangent);
    layout.tangents.push_back(tangent);
  }
}

// The gradients that a rule steps along, its state, and what its pullback needs. A block without the
// body's part starts where that would.
void add_rule(Allocator& allocate, const Description& network, int64_t head, Layout& layout) {
  const auto blocks = [&](int count) { return allocate.block(count * head) - layout.body; };
  const int gradients = keeps_gradients(network) ? network.steps : 1;
  layout.gradient = blocks(gradients);
  const int states = states_of(network.rule);
  for (int j = 0; j < states; ++j) {
    layout.states[j] = blocks(keeps_states(network) ? network.steps : 1);
  }
  if (network.rule.clips) layout.clips = allocate.matrix(gradients, 1);
  layout.sum = allocate.column(1);
  if (!sweeps(network)) return;
  for (int j = 0; j < states; ++j) layout.cotangents[j] = blocks(1);
  if (!learns_hyperparameters(network)) return;
  for (int64_t& slopes : layout.slopes) slopes = blocks(1);
  layout.ones = blocks(1);
}

// Every matrix and block of a layout that lies from there on, by `use(offset)`.
template <class Use>
void for_each_offset(LayoutIn<OnHost>& layout, Use use) {
  const auto views = [use](std::initializer_list<View*> each) {
    for (View* view : each) use(view->offset);
  };
  const auto sums = [&](Sums& each) { views({&each.plain, &each.along}); };
  for (Examples* set : {&layout.support, &layout.query}) {
    views({&set->inputs, &set->of_inputs, &set->of_inputs_before, &set->targets, &set->weights,
           &set->row, &set->second_row, &set->loss_weights, &set->mass});
    for (auto* list : {&set->loss_inputs, &set->gradients, &set->sums}) {
      for (View& view : *list) use(view.offset);
    }
    for (Trace& t : set->traces) {
      views({&t.value, &t.delta, &t.slope, &t.curve, &t.product, &t.product_delta, &t.mean,
             &t.inverse, &t.softmax, &t.mask});
      sums(t.sums), sums(t.of_rows);
    }
  }
  for (Tangent& r : layout.tangents) {
    views({&r.value, &r.bend, &r.delta, &r.normalised});
    sums(r.value_sums), sums(r.delta_sums), sums(r.of_rows);
  }
  views({&layout.loss, &layout.chunk_loss});
  for (int64_t* offset : {&layout.partial, &layout.scratch}) use(*offset);
}

// The parts of the chunks, each with what lies from `begin` on of its own.
void add_parts(int count, int64_t begin, Layout& layout) {
  const int64_t size = layout.size - begin;
  for (int part = 0; part < count; ++part) {
    layout.parts.push_back(layout);
    LayoutIn<OnHost>& own = layout.parts.back();
    for_each_offset(own, [&](int64_t& offset) {
      if (offset >= begin) offset += part * size;
    });
    own.lambda = own.partial;
    own.scalar = own.chunk_loss;
  }
  layout.size += (count - 1) * size;
}

void add_dual(Allocator& allocate, const Description& network, const LayerPlace& place,
              bool on_gpu, DualPlaceIn<OnHost>& dual) {
  const Dense& layer = network.layers.front();
  const int r = network.all_support(), q = network.query, h = layer.out;
  const int together = network.together;
  dual.weight = {place.of[kWeight], h, layer.in, place.weight_row_stride, place.weight_col_stride};
  dual.support = allocate.matrix(together * r, h);
  if (!on_gpu) dual.query = allocate.matrix(together * q, h);
  dual.steps.resize(network.steps + 1);
  if (layer.adapts[kWeight]) {
    dual.gram = allocate.matrix(r, r);
    dual.cross = allocate.matrix(q, r);
    // With a set for each step, plain SGD only adds rows to S, so all S_k share one matrix.
    const bool shares = network.per_step_support && is_plain(network.rule);
    dual.steps[0] = allocate.matrix(r, h);
    for (int k = 1; k <= network.steps; ++k) {
      dual.steps[k] = shares ? dual.steps[0] : allocate.matrix(r, h);
    }
    if (!is_plain(network.rule)) dual.buffer = allocate.matrix(r, h);
  }
  if (!network.differentiate) return;
  if (dual.buffer.rows > 0) dual.buffer_cotangent = allocate.matrix(r, h);
  dual.gradient = dual.weight;
  dual.gradient.offset = allocate.like(dual.weight);
  dual.of_query = allocate.matrix(together * q, h);
  dual.of_support = allocate.matrix(together * r, h);
  dual.pull = allocate.matrix(r, h);
  if (!on_gpu) dual.along = allocate.matrix(r, h);
}

// Whether layers from there on read nothing before it but the last one and the data.
bool can_begin_at(const Description& network, int body) {
  for (std::size_t l = body; l < network.layers.size(); ++l) {
    for (const int read : {network.layers[l].from, network.layers[l].plus}) {
      if (read >= 0 && read < body - 1) return false;
    }
  }
  return true;
}

// None where each step has inputs or masks of its own. Never the last layer: losses may overwrite what
// it gives.
int longest_body(const Description& network) {
  if (network.per_step_support) return 0;
  const int most = std::min(network.still, int(network.layers.size()) - 1);
  int body = 0;
  while (body < most && !network.layers[body].masked) ++body;
  while (!can_begin_at(network, body)) --body;
  return body;
}

}  // namespace

void connect(Description& network) {
  auto& layers = network.layers;
  std::vector<bool> read(layers.size());
  for (std::size_t l = layers.size(); l-- > 0;) {
    Dense& layer = layers[l];
    if (layer.from >= 0) layer.adds_from = read[layer.from], read[layer.from] = true;
    if (layer.plus >= 0) layer.adds_plus = read[layer.plus], read[layer.plus] = true;
  }
  for (Dense& layer : layers) {
    const auto moves = [&](int read) { return read >= 0 && layers[read].moves; };
    layer.moves = std::any_of(layer.adapts, layer.adapts + kTensors, [](bool each) { return each; }) ||
                  moves(layer.from) || moves(layer.plus);
  }
  const auto moves = [](const Dense& layer) { return layer.moves; };
  network.still = int(std::find_if(layers.begin(), layers.end(), moves) - layers.begin());
  network.body = longest_body(network);
}

bool reads_data_again(const Description& network) {
  for (const Dense& layer : network.layers) {
    const bool is_first = &layer == &network.layers.front();
    if (layer.plus == kData) return true;
    if (layer.from == kData && (!is_first || !layer.has[kWeight])) return true;
  }
  return false;
}

Layout lay_out(const Description& network, int width, Rows rows) {
  const bool on_gpu = rows != Rows::close;
  Layout layout{};
  Allocator allocate(width, rows), block(width, rows);
  layout.one = allocate.matrix(1, 1);
  layout.zero = allocate.matrix(1, 1);
  const bool transposed = width > 1;
  for (const Dense& layer : network.layers) {
    if (int(layout.layers.size()) == network.body) layout.body = block.size();
    const bool is_dual = network.dual && layout.layers.empty();
    LayerPlace place{};
    if (layer.has[kWeight]) {
      Allocator& of_weight = is_dual ? allocate : block;
      const View weight = transposed ? of_weight.matrix(layer.in, layer.out)
                                     : of_weight.matrix(layer.out, layer.in);
      place.of[kWeight] = weight.offset;
      place.weight_row_stride = transposed ? 1 : weight.row_stride;
      place.weight_col_stride = transposed ? weight.row_stride : 1;
      layout.parameters += int64_t(layer.in) * layer.out;
    }
    if (is_dual) add_dual(allocate, network, place, on_gpu, layout.dual);
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
    if (transposed && network.dual) {
      const int64_t panel = int64_t(layer.in) * block.padded(network.all_support());
      layout.scratch = std::max(layout.scratch, panel);
    }
    if (transposed && layer.has[kWeight] && (layout.layers.size() > 1 || network.inputs_flow)) {
      const int64_t panel = int64_t(layer.out) * block.padded(layer.in);
      layout.scratch = std::max(layout.scratch, 2 * panel);
    }
  }
  layout.block = block.size();
  const bool reverses = network.differentiate;
  layout.thetas_kept = 1 + (keeps_weights(network) ? network.steps : 1);
  const bool keeps = network.chunk > 0 ? network.keeps_chunks : sweeps(network) || network.open;
  layout.traces_kept = keeps ? std::max(1, network.steps * network.chunks(network.support)) : 1;
  const int64_t head = layout.block - layout.body;
  layout.theta = allocate.block(layout.body + layout.thetas_kept * head);
  layout.scalar = allocate.column(1);
  // A block without the body's part starts where that would.
  const auto head_block = [&] { return allocate.block(head) - layout.body; };
  if (network.elementwise_rates) layout.rate = head_block();
  if (!steps_plainly(network)) {
    add_rule(allocate, network, head, layout);
  } else if (network.elementwise_rates || network.learned_rates) {
    layout.gradient = head_block();
  }
  if (reverses) {
    layout.lambda = allocate.block(layout.block);
    if (network.reversible || network.open) layout.vector = head_block();
    if (network.prox != 0) layout.anchor = head_block();
  }
  // Only products read inputs where they are.
  const bool copies = width == 1 || reads_data_again(network);
  const int support = network.rows(network.support), query = network.rows(network.query);
  // Those that stay are written by one part each.
  Examples kept{};
  if (layout.traces_kept > 1 && network.chunk > 0) {
    add_traces(allocate, network, layout, support, layout.traces_kept, true, kept);
  }
  const int64_t begin = allocate.size();
  // The dual form multiplies with the inputs of all steps at once.
  const int inputs = network.dual ? network.all_support() : support;
  layout.support = examples(allocate, network, network.loss, support, inputs, copies || !network.open);
  if (kept.traces.empty()) {
    add_traces(allocate, network, layout, support, layout.traces_kept, true, layout.support);
  } else {
    layout.support.traces = kept.traces;
  }
  layout.query = examples(allocate, network, network.query_loss, query, query, copies);
  add_traces(allocate, network, layout, query, 1, on_gpu, layout.query);
  if (on_gpu && reverses) {
    // A GPU's memory is short: the buffers of a step's backward pass alias what the query set leaves
    // behind the body.
    allocate.lay_over(layout.query.traces[network.body].value.offset);
    if (network.dual) {
      layout.dual.along = allocate.matrix(network.all_support(), network.layers[0].out);
    }
    if (!network.first_order) add_tangents(allocate, network, layout);
    allocate.lay_behind();
  }
  for (const Examples* set : {&layout.support, &layout.query}) {
    for (const View& sum : set->sums) layout.captured += sum.cols;
  }
  if (!on_gpu && reverses && !network.first_order) add_tangents(allocate, network, layout);
  if (network.chunk > 0) {
    layout.partial = allocate.block(layout.block);
    layout.loss = allocate.column(1);
    layout.chunk_loss = allocate.column(1);
  }
  layout.scratch = allocate.block(layout.scratch);
  layout.size = allocate.size();
  if (network.chunk > 0) add_parts(network.parts, begin, layout);
  return layout;
}

int64_t gradient_size(const Description& network, const LayoutIn<OnHost>& layout) {
  const int options = int(network.rule.learns[0]) + int(network.rule.learns[1]);
  return layout.parameters + rate_gradients(network, layout) + options + layout.captured;
}

}  // namespace fastmeta
