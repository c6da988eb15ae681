// One task's meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
#pragma once

#include <algorithm>

#include "blocks.h"
#include "conv_loss.h"

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
        depth(int(network.blocks.size())), blocks(network, layout, call.parameters, numbers),
        support_count(call.support_counts ? int(call.support_counts[task]) : n.support),
        query_count(call.query_counts ? int(call.query_counts[task]) : n.query),
        support_loss(n.loss, support_count, n.blocks[depth - 1].filters,
                     layout.shapes[depth - 1].out, numbers + layout.support_loss),
        query_loss(n.loss, query_count, n.blocks[depth - 1].filters, layout.shapes[depth - 1].out,
                   numbers + layout.query_loss) {}

  void run() {
    load();
    if (n.steps > 0) blocks.forward(body(support(0)), call.parameters);
    if (n.query > 0) blocks.forward(body(query()), call.parameters);
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
    // The body's gradient, of what the steps have summed after it.
    T* const lambda = numbers + layout.lambda;
    blocks.backward(body(query()), call.parameters, true, lambda, false);
    if (n.steps > 0 && !n.first_order) {
      blocks.backward(body(support(0)), call.parameters, false, lambda, false);
    }
    const T weight = call.task_weights[task];
    for (int64_t i = 0; i < layout.block; ++i) sums[i] += weight * lambda[i];
  }

 private:
  const Network& n;
  const Layout& layout;
  const Call<T>& call;
  const int64_t task;
  T *const numbers, *const sums;
  const int depth;
  const Blocks<T> blocks;
  const int support_count, query_count;  // of this task; what is behind them fills up
  const T *support_x = nullptr, *query_x = nullptr;
  TaskLoss<T> support_loss, query_loss;

  // All blocks over a set, at an inner step; and those parts of them that run apart.
  Part<T> support(int k) const {
    const int64_t kept = layout.steps_kept > 1 ? k * depth : 0;
    return {0, depth, support_x, layout.support.data() + kept, support_count};
  }
  Part<T> query() const { return {0, depth, query_x, layout.query.data(), query_count}; }
  Part<T> body(Part<T> all) const {
    all.last = layout.body;
    return all;
  }
  Part<T> head(Part<T> all) const {
    all.first = layout.body;
    return all;
  }
  T* output(const Part<T>& of) const { return numbers + of.kept[depth - 1].output; }
  T* output_delta(const Part<T>& of) const { return numbers + of.kept[depth - 1].output_delta; }
  // The block of theta_k. Those of all steps share one, where they are not kept.
  T* theta(int k) const {
    return numbers + layout.weights + (layout.weights_kept > 1 ? k - 1 : 0) * layout.block;
  }
  const T* parameters(int k) const { return k == 0 ? call.parameters : theta(k); }
  T* gradient(int k) const {
    return numbers + layout.gradient + (layout.gradients_kept > 1 ? k : 0) * layout.block;
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
    if (n.steps > 0) blocks.measure(support(0));
    if (n.query > 0) blocks.measure(query());
    conv::clear(numbers + layout.lambda, layout.block);
    conv::clear(numbers + layout.anchor, layout.block);
    clear_sums(query());
    clear_sums(support(0));
  }

  // Of derivatives by the body's output.
  void clear_sums(const Part<T>& of) const {
    if (layout.body == 0) return;
    const Shape& s = layout.shapes[layout.body - 1];
    const int64_t pixels = n.blocks[layout.body - 1].mean ? 1 : s.out_pixels();
    conv::clear(numbers + of.kept[layout.body - 1].output_delta, of.examples * pixels * s.out);
  }

  // Channels last, in a frame of zeros. Where batch statistics take away what all patches have in
  // common, each channel's level is taken already here, and its digits with it: that of a blank
  // background, which becomes zero, so that what rounding makes of all its pixels alike has no
  // weight; else the mean.
  const T* placed(const T* x, int64_t examples, T* to) const {
    const fastmeta::conv::Block& b = n.blocks[0];
    const int top = layout.frame[0], left = layout.frame[1];
    const int64_t plane = int64_t(b.height) * b.width, across = b.width + 2 * left;
    T* const level = numbers + (layout.centres ? layout.pulls : layout.zero);
    for (int c = 0; layout.centres && examples > 0 && c < b.channels; ++c) {
      const T* const channel = x + c * plane;
      if (is_blank(channel, examples, b.channels * plane, plane, level[c])) continue;
      double sum = 0;
      for (int64_t e = 0; e < examples; ++e) sum += total(channel + e * b.channels * plane, plane);
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
  // Whether of some pixels of a channel, whose images lie `pitch` apart, a third are equal to their
  // median, `level`. They are sorted by insertion: NaN only leaves them out of order.
  static bool is_blank(const T* x, int64_t examples, int64_t pitch, int64_t plane, T& level) {
    constexpr int kSample = 63;
    T sorted[kSample];
    for (int i = 0; i < kSample; ++i) {
      const int64_t at = examples * plane * i / kSample;
      const T one = x[at / plane * pitch + at % plane];
      int j = i;
      for (; j > 0 && sorted[j - 1] > one; --j) sorted[j] = sorted[j - 1];
      sorted[j] = one;
    }
    level = sorted[kSample / 2];
    return std::count(sorted, sorted + kSample, level) >= kSample / 3;
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

  void inner_step(int k) {  // (1)
    const Part<T> part = head(support(k));
    blocks.forward(part, parameters(k));
    call.support_losses[k * call.tasks + task] = support_loss.forward(output(part));
    support_loss.backward(output_delta(part));
    T* const g = gradient(k);
    conv::clear(g, layout.block);
    blocks.backward(part, parameters(k), false, g, false);
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
    const Part<T> part = head(query());
    const int classes = n.blocks[depth - 1].filters;
    blocks.forward(part, parameters(k));
    call.step_losses[k * call.tasks + task] = query_loss.forward(output(part));
    if (k == n.steps) query_loss.store(call.query_outputs + task * n.query * classes);
    const T w = T(call.step_weights[k]);
    if (!n.differentiate || w == T(0)) return;
    T* const delta = output_delta(part);
    query_loss.backward(delta);
    for (int64_t i = 0; i < int64_t(query_count) * layout.shapes[depth - 1].out; ++i) delta[i] *= w;
    blocks.backward(part, parameters(k), true, numbers + layout.lambda, true);
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
    const Part<T> part = head(support(k));
    const Moving& r = layout.moving[depth - 1];
    const T* const vector = numbers + layout.vector;
    blocks.tangent_forward(part, parameters(k), vector);
    support_loss.forward(output(part));
    support_loss.tangent(numbers + r.output, numbers + r.output_delta);
    blocks.tangent_backward(part, parameters(k), vector, numbers + layout.lambda);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
