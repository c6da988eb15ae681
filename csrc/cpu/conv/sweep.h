// One task's meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
#pragma once

#include "block.h"
#include "conv_loss.h"
#include "first_block.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::Call;
using fastmeta::conv::TaskLoss;

template <class T>
class TaskStep {
 public:
  // `sums` [block, and that of rates]: what is added up over tasks.
  TaskStep(const Network& network, const Layout& layout, const Call<T>& call, int64_t task,
           T* numbers, T* sums)
      : n(network), layout(layout), call(call), task(task), numbers(numbers), sums(sums),
        depth(int(network.blocks.size())),
        support_count(call.support_counts ? int(call.support_counts[task]) : n.support),
        query_count(call.query_counts ? int(call.query_counts[task]) : n.query),
        support_loss(n.loss, support_count, n.blocks[depth - 1].filters,
                     layout.shapes[depth - 1].out, numbers + layout.support_loss),
        query_loss(n.loss, query_count, n.blocks[depth - 1].filters, layout.shapes[depth - 1].out,
                   numbers + layout.query_loss) {}

  void run() {
    load();
    if (n.steps > 0) forward(support_x, support(0), support_count, 0, 0, layout.body);
    if (n.query > 0) forward(query_x, layout.query.data(), query_count, 0, 0, layout.body);
    for (int k = 0; k < n.steps; ++k) {
      if (!fastmeta::conv::sweeps(n)) add_query(k);
      inner_step(k);
    }
    add_query(n.steps);  // (2)
    if (!n.differentiate) return;
    for (int k = n.steps - 1; fastmeta::conv::sweeps(n) && k >= 0; --k) {
      through_step(k);  // (3), (4)
      add_query(k);
    }
    if (n.prox != 0 && !n.first_order) add_scaled(T(-n.prox), layout.anchor);  // (5)
    backward_body(query_x, layout.query.data(), query_count, true);
    if (n.steps > 0 && !n.first_order) backward_body(support_x, support(0), support_count, false);
    const T weight = call.task_weights[task];
    const T* const lambda = numbers + layout.lambda;
    for (int64_t i = 0; i < layout.block; ++i) sums[i] += weight * lambda[i];
  }

 private:
  const Network& n;
  const Layout& layout;
  const Call<T>& call;
  const int64_t task;
  T *const numbers, *const sums;
  const int depth;
  const int support_count, query_count;  // of this task; what is behind them fills up
  const T *support_x = nullptr, *query_x = nullptr;
  TaskLoss<T> support_loss, query_loss;

  Block<T> block(int l, int64_t examples) const {
    return {n.blocks[l], layout.shapes[l], layout, examples, call.parameters, numbers};
  }
  // The first layer, where it goes by its patches.
  bool by_patches(int l) const { return l == 0 && layout.strip_rows > 0; }
  FirstBlock<T> first_block() const {
    return {n.blocks[0], layout.shapes[0], layout, call.parameters, numbers};
  }
  // The block of theta_k. Those of all steps share one, where they are not kept.
  T* theta(int k) const {
    return numbers + layout.weights + (layout.weights_kept > 1 ? k - 1 : 0) * layout.block;
  }
  const T* parameters(int k) const { return k == 0 ? call.parameters : theta(k); }
  T* gradient(int k) const {
    return numbers + layout.gradient + (layout.gradients_kept > 1 ? k : 0) * layout.block;
  }
  // A layer's tensors in a block; `scale` in place of a scale that it lacks.
  Tensors<T> tensors(int l, const T* from, int64_t scale) const {
    const fastmeta::conv::Block& b = n.blocks[l];
    const int64_t* of = layout.shapes[l].of;
    return {{from + of[kWeight], b.has[kBias] ? from + of[kBias] : nullptr,
             b.has[kScale] ? from + of[kScale] : numbers + scale,
             b.has[kShift] ? from + of[kShift] : numbers + layout.zero}};
  }
  Tensors<T> at(int l, int k) const {
    return tensors(l, parameters(l < layout.body ? 0 : k), layout.one);
  }
  const Kept* support(int k) const {
    return layout.support.data() + (layout.steps_kept > 1 ? k * depth : 0);
  }
  const T* input(const T* x, const Kept* kept, int l) const {
    return l == 0 ? x : numbers + kept[l - 1].output;
  }
  T* cotangent(const Kept* kept) const { return numbers + kept[layout.body - 1].output_delta; }
  int64_t border_size(int64_t examples) const {
    const fastmeta::conv::Block& b = n.blocks[layout.body];
    return examples * b.height * b.width * layout.shapes[layout.body].in;
  }
  void add(T w, const T* from, int64_t count, T* to) const {
    for (int64_t i = 0; i < count; ++i) to[i] += w * from[i];
  }
  void add_scaled(T w, int64_t from) {
    add(w, numbers + from, layout.block, numbers + layout.lambda);
  }

  // use(layer, tensor, offset in a block, size) of what is not in the body
  template <class Use>
  void head_tensors(Use use) const {
    for (int l = layout.body; l < depth; ++l) {
      const Shape& s = layout.shapes[l];
      for (int i = 0; i < kTensors; ++i) {
        if (!n.blocks[l].has[i]) continue;
        use(l, i, s.of[i], i == kWeight ? int64_t(s.depth()) * s.out : int64_t(s.out));
      }
    }
  }

  void load() {
    for (int64_t i = layout.one; i < layout.zero; ++i) numbers[i] = T(1);
    for (int64_t i = 0; i < layout.zero - layout.one; ++i) numbers[layout.zero + i] = T(0);
    const int64_t image = int64_t(n.blocks[0].channels) * n.blocks[0].height * n.blocks[0].width;
    support_x = placed(call.support_x + task * n.support * image, support_count,
                       numbers + layout.support_x);
    query_x = placed(call.query_x + task * n.query * image, query_count, numbers + layout.query_x);
    const int classes = n.blocks[depth - 1].filters;
    const auto of = [&](auto* all, int64_t size) { return all ? all + task * size : all; };
    const int64_t rows = int64_t(n.support) * classes, query_rows = int64_t(n.query) * classes;
    const bool of_classes = n.loss.kind == LossKind::cross_entropy;
    support_loss.load(of(call.support_y, rows), of(call.support_labels, n.support),
                      of(call.support_factors, of_classes ? 0 : rows));
    query_loss.load(of(call.query_y, query_rows), of(call.query_labels, n.query),
                    of(call.query_factors, of_classes ? 0 : query_rows));
    if (by_patches(0)) {
      if (n.steps > 0) first_block().measure(support_x, support_count, layout.support_measured);
      if (n.query > 0) first_block().measure(query_x, query_count, layout.query_measured);
    }
    conv::clear(numbers + layout.lambda, layout.block);
    conv::clear(numbers + layout.anchor, layout.block);
    if (layout.body == 0) return;
    conv::clear(cotangent(layout.query.data()), border_size(query_count));
    conv::clear(cotangent(support(0)), border_size(support_count));
  }

  // Channels last, in the frame that the first block reads. Where batch statistics take away what all
  // patches have in common, each channel's level is taken already here, and its digits with it.
  const T* placed(const T* x, int64_t examples, T* to) const {
    const fastmeta::conv::Block& b = n.blocks[0];
    const int top = by_patches(0) ? b.padding[0] : 0, left = by_patches(0) ? b.padding[1] : 0;
    const int64_t plane = int64_t(b.height) * b.width, across = b.width + 2 * left;
    const bool centres = by_patches(0) && b.norm == Norm::batch;
    T* const level = numbers + (centres ? layout.pulls : layout.zero);
    for (int c = 0; centres && c < b.channels; ++c) {
      double sum = 0;
      for (int64_t e = 0; e < examples; ++e) sum += total(x + (e * b.channels + c) * plane, plane);
      level[c] = T(sum / double(examples * plane));
    }
    T* at = to;
    const auto pad = [&](int64_t pixels) {
      for (int64_t i = 0; i < pixels; ++i) {
        for (int c = 0; c < b.channels; ++c) *at++ = -level[c];
      }
    };
    for (int64_t e = 0; e < examples; ++e, x += b.channels * plane) {
      pad(top * across);
      for (int64_t first = 0; first < plane; first += b.width) {
        pad(left);
        for (int64_t i = first; i < first + b.width; ++i) {
          for (int c = 0; c < b.channels; ++c) *at++ = x[c * plane + i] - level[c];
        }
        pad(left);
      }
      pad(top * across);
    }
    return to;
  }
  static T total(const T* from, int64_t count) {
    Num<T> sum{};
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) sum += conv::load(from + i);
    T all[lanes<T>], rest = 0;
    conv::store(all, sum);
    for (int l = 0; l < lanes<T>; ++l) rest += all[l];
    for (; i < count; ++i) rest += from[i];
    return rest;
  }

  void forward(const T* x, const Kept* kept, int64_t examples, int k, int from, int to) {
    for (int l = from; l < to; ++l) {
      if (by_patches(l)) {
        first_block().forward(x, kept[0], at(0, k), examples);
        continue;
      }
      block(l, examples).forward(input(x, kept, l), kept[l], at(l, k));
    }
  }

  // From the derivative by the last output down to the body, adding to `into`. A derivative by the
  // body's output is added to its sums there.
  void backward(const T* x, const Kept* kept, int64_t examples, int k, bool in_place, T* into,
                bool to_body) {
    for (int l = depth - 1; l >= layout.body; --l) {
      if (by_patches(l)) {
        first_block().backward(x, kept[0], at(0, k), examples, into);
        continue;
      }
      const bool border = l == layout.body;
      T* const x_delta = border ? (to_body && l > 0 ? numbers + layout.border : nullptr)
                                : numbers + kept[l - 1].output_delta;
      const int64_t result = in_place ? kept[l].product
                             : kept[l].product_delta >= 0 ? kept[l].product_delta
                                                          : layout.product_delta;
      block(l, examples).backward(input(x, kept, l), kept[l], at(l, k), result, into, x_delta);
      if (border && x_delta) add(T(1), x_delta, border_size(examples), cotangent(kept));
    }
  }

  // lambda += the body's gradient, of what the steps have summed after it.
  void backward_body(const T* x, const Kept* kept, int64_t examples, bool in_place) {
    for (int l = layout.body - 1; l >= 0; --l) {
      if (by_patches(l)) {
        first_block().backward(x, kept[0], at(0, 0), examples, numbers + layout.lambda);
        continue;
      }
      T* const x_delta = l == 0 ? nullptr : numbers + kept[l - 1].output_delta;
      block(l, examples)
          .backward(input(x, kept, l), kept[l], at(l, 0),
                    in_place ? kept[l].product : layout.product_delta, numbers + layout.lambda,
                    x_delta);
    }
  }

  void inner_step(int k) {  // (1)
    const Kept* const kept = support(k);
    forward(support_x, kept, support_count, k, layout.body, depth);
    call.support_losses[k * call.tasks + task] =
        support_loss.forward(numbers + kept[depth - 1].output);
    support_loss.backward(numbers + kept[depth - 1].output_delta);
    T* const g = gradient(k);
    conv::clear(g, layout.block);
    backward(support_x, kept, support_count, k, false, g, false);
    const T *const here = parameters(k), *const anchor = parameters(0);
    T* const next = theta(k + 1);
    const T prox = T(n.prox);
    head_tensors([&](int l, int i, int64_t from, int64_t size) {
      const Rate a = rate(k, l, i);
      const bool adapts = n.blocks[l].adapts[i];
      for (int64_t j = from; j < from + size; ++j) {
        g[j] += prox * (here[j] - anchor[j]);
        next[j] = adapts ? here[j] - a(j) * g[j] : here[j];
      }
    });
  }
  // Of a tensor, or of each element by its place in a block.
  struct Rate {
    T one;
    const T* each;
    T operator()(int64_t j) const { return each ? each[j] : one; }
  };
  Rate rate(int k, int l, int tensor) const {
    if (n.elementwise_rates) return {T(0), call.rates + k * layout.block};
    return {call.rates[(k * depth + l) * kTensors + tensor], nullptr};
  }

  // lambda += w_k grad L_q(theta_k)
  void add_query(int k) {
    if (n.query == 0 || !call.evaluates[k]) return;
    const Kept* const kept = layout.query.data();
    const int classes = n.blocks[depth - 1].filters;
    forward(query_x, kept, query_count, k, layout.body, depth);
    call.step_losses[k * call.tasks + task] = query_loss.forward(numbers + kept[depth - 1].output);
    if (k == n.steps) query_loss.store(call.query_outputs + task * n.query * classes);
    const T w = T(call.step_weights[k]);
    if (!n.differentiate || w == T(0)) return;
    T* const delta = numbers + kept[depth - 1].output_delta;
    query_loss.backward(delta);
    for (int64_t i = 0; i < int64_t(query_count) * layout.shapes[depth - 1].out; ++i) delta[i] *= w;
    backward(query_x, kept, query_count, k, true, numbers + layout.lambda, true);
  }

  void through_step(int k) {
    const T *const lambda = numbers + layout.lambda, *const g = gradient(k);
    T *const vector = numbers + layout.vector, *const anchor = numbers + layout.anchor;
    const T weight = call.task_weights[task];
    conv::clear(vector, layout.block);
    // The vector is -a_k * lambda_{k+1}, so that its products add to lambda.
    head_tensors([&](int l, int i, int64_t from, int64_t size) {
      if (!n.blocks[l].adapts[i]) return;
      const Rate a = rate(k, l, i);
      for (int64_t j = from; j < from + size; ++j) vector[j] = -a(j) * lambda[j];
      if (!n.learned_rates) return;
      if (n.elementwise_rates) {
        T* const each = sums + layout.block * (1 + k);
        for (int64_t j = from; j < from + size; ++j) each[j] -= weight * lambda[j] * g[j];
        return;
      }
      T along = 0;
      for (int64_t j = from; j < from + size; ++j) along += lambda[j] * g[j];
      sums[layout.block + (k * depth + l) * kTensors + i] -= weight * along;
    });
    if (n.first_order) return;
    if (n.prox != 0) {
      add_scaled(T(n.prox), layout.vector);
      add(T(1), vector, layout.block, anchor);
    }
    add_hessian_product(k);
  }

  // lambda += H_k times the vector, forward over reverse, on what the inner step left.
  void add_hessian_product(int k) {
    const Kept* const kept = support(k);
    const Moving* const r = layout.moving.data();
    const T* const vector = numbers + layout.vector;
    const auto moving_input = [&](int l) {
      return l == layout.body ? nullptr : numbers + r[l - 1].output;
    };
    for (int l = layout.body; l < depth; ++l) {
      const Tensors<T> v = tensors(l, vector, layout.zero);
      if (by_patches(l)) {
        first_block().tangent_forward(support_x, kept[0], r[0], at(0, k), v, support_count);
        continue;
      }
      block(l, support_count)
          .tangent_forward(input(support_x, kept, l), moving_input(l), kept[l], r[l], at(l, k), v);
    }
    support_loss.forward(numbers + kept[depth - 1].output);
    support_loss.tangent(numbers + r[depth - 1].output, numbers + r[depth - 1].output_delta);
    for (int l = depth - 1; l >= layout.body; --l) {
      const Tensors<T> v = tensors(l, vector, layout.zero);
      if (by_patches(l)) {
        first_block().tangent_backward(support_x, kept[0], r[0], at(0, k), v, support_count,
                                       numbers + layout.lambda);
        continue;
      }
      const bool border = l == layout.body;
      T* const x_delta = border ? (l > 0 ? numbers + layout.border : nullptr)
                                : numbers + r[l - 1].output_delta;
      block(l, support_count)
          .tangent_backward(input(support_x, kept, l), moving_input(l), kept[l], r[l], at(l, k), v,
                            numbers + layout.lambda, x_delta);
      if (border && x_delta) add(T(1), x_delta, border_size(support_count), cotangent(kept));
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
