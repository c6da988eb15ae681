// One task's meta-step: K inner steps forward, then the reverse sweep. Equations: docs/design.md.
#pragma once

#include "blocks.h"
#include "conv_loss.h"
#include "placing.h"
#include "updates.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::TaskLoss;

template <class T>
class TaskStep {
 public:
  explicit TaskStep(const TaskViews<T>& views)
      : s(views), n(s.n), layout(s.layout), call(s.call), task(s.task), workspace(s.workspace),
        depth(s.depth), blocks(n, layout, call.parameters, workspace), updates(s),
        query_count(call.query_counts ? int(call.query_counts[task]) : n.query),
        query_loss(n.query_loss, query_count, n.blocks[depth - 1].filters,
                   layout.shapes[depth - 1].out, workspace + layout.query_loss) {}

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
      updates.pull_back(k);  // (3)
      if (!n.first_order) add_hessian_product(k);  // (4)
      add_query(k);
    }
    T* const lambda = s.lambda();
    if (n.prox != 0 && !n.first_order) s.add(T(-n.prox), s.anchor(), layout.block, lambda);  // (5)
    // The body's gradient, of what the steps have summed after it.
    blocks.backward(body(query()), call.parameters, true, lambda, false);
    if (n.steps > 0 && !n.first_order) {
      blocks.backward(body(support(0)), call.parameters, false, lambda, false);
    }
    const T weight = call.task_weights[task];
    for (int64_t i = 0; i < layout.block; ++i) s.sums[i] += weight * lambda[i];
  }

 private:
  const TaskViews<T> s;
  const Network& n;
  const Layout& layout;
  const Call<T>& call;
  const int64_t task;
  T* const workspace;
  const int depth;
  const Blocks<T> blocks;
  const Updates<T> updates;
  const int query_count;  // of this task; what is behind them fills up
  TaskLoss<T> query_loss;

  // The place of step k's support set among those of all tasks, and how many of its examples are real.
  int64_t set(int k) const { return task * n.sets() + n.set(k); }
  int support_count(int k) const {
    return call.support_counts && n.steps > 0 ? int(call.support_counts[set(k)]) : n.support;
  }
  T* support_x(int k) const {
    return workspace + layout.support_x + (layout.sets_kept > 1 ? k : 0) * layout.support_size;
  }
  // All blocks over a set, at an inner step; and those parts of them that run apart.
  Part<T> support(int k) const {
    const int64_t kept = layout.steps_kept > 1 ? k * depth : 0;
    return {0, depth, support_x(k), layout.support.data() + kept, support_count(k)};
  }
  Part<T> query() const {
    return {0, depth, workspace + layout.query_x, layout.query.data(), query_count};
  }
  Part<T> body(Part<T> all) const {
    all.last = layout.body;
    return all;
  }
  Part<T> head(Part<T> all) const {
    all.first = layout.body;
    return all;
  }
  T* output(const Part<T>& of) const { return workspace + of.kept[depth - 1].output; }
  T* output_delta(const Part<T>& of) const { return workspace + of.kept[depth - 1].output_delta; }

  int64_t image() const {
    return int64_t(n.blocks[0].channels) * n.blocks[0].height * n.blocks[0].width;
  }
  void load() {
    for (int64_t i = layout.one; i < layout.zero; ++i) workspace[i] = T(1);
    for (int64_t i = 0; i < layout.zero - layout.one; ++i) workspace[layout.zero + i] = T(0);
    if (!n.per_step_support && n.steps > 0) place_support(0);
    Placing<T>(n, layout, workspace)
        .place(call.query_x + task * n.query * image(), query_count, workspace + layout.query_x);
    load_loss(query_loss, n.query_loss, task, n.query, call.query_y, call.query_labels,
              call.query_factors);
    if (n.query > 0) blocks.measure(query());
    conv::clear(s.lambda(), layout.block);
    conv::clear(s.anchor(), layout.block);
    updates.begin();
    clear_sums(query());
    clear_sums(support(0));
  }
  void place_support(int k) const {
    Placing<T>(n, layout, workspace)
        .place(call.support_x + set(k) * n.support * image(), support_count(k), support_x(k));
    blocks.measure(support(k));
  }
  // From the targets of a set at this place among all.
  void load_loss(TaskLoss<T>& to, const Loss& loss, int64_t set, int examples, const T* y,
                 const int64_t* labels, const T* factors) const {
    const auto of = [&](auto* all, int64_t size) { return all ? all + set * size : all; };
    const int64_t rows = int64_t(examples) * n.blocks[depth - 1].filters;
    const bool of_classes = loss.kind == LossKind::cross_entropy;
    to.load(of(y, rows), of(labels, examples), of(factors, of_classes ? 0 : rows));
  }
  TaskLoss<T> support_loss(int k) const {
    TaskLoss<T> loss(n.loss, support_count(k), n.blocks[depth - 1].filters,
                     layout.shapes[depth - 1].out, workspace + layout.support_loss);
    load_loss(loss, n.loss, set(k), n.support, call.support_y, call.support_labels,
              call.support_factors);
    return loss;
  }

  // Of derivatives by the body's output.
  void clear_sums(const Part<T>& of) const {
    if (layout.body == 0) return;
    const Shape& shape = layout.shapes[layout.body - 1];
    const int64_t pixels = n.blocks[layout.body - 1].mean ? 1 : shape.out_pixels();
    conv::clear(workspace + of.kept[layout.body - 1].output_delta, of.examples * pixels * shape.out);
  }

  void inner_step(int k) const {  // (1)
    if (n.per_step_support) place_support(k);
    const Part<T> part = head(support(k));
    blocks.forward(part, s.parameters(k));
    TaskLoss<T> loss = support_loss(k);
    call.support_losses[k * call.tasks + task] = loss.forward(output(part));
    loss.backward(output_delta(part));
    conv::clear(s.gradient(k), layout.block);
    blocks.backward(part, s.parameters(k), false, s.gradient(k), false);
    updates.step(k);
  }

  // lambda += w_k grad L_q(theta_k)
  void add_query(int k) {
    if (n.query == 0 || !call.evaluates[k]) return;
    const Part<T> part = head(query());
    const int classes = n.blocks[depth - 1].filters;
    blocks.forward(part, s.parameters(k));
    call.step_losses[k * call.tasks + task] = query_loss.forward(output(part));
    if (k == n.steps) query_loss.store(call.query_outputs + task * n.query * classes);
    const T w = T(call.step_weights[k]);
    if (!n.differentiate || w == T(0)) return;
    T* const delta = output_delta(part);
    query_loss.backward(delta);
    for (int64_t i = 0; i < int64_t(query_count) * layout.shapes[depth - 1].out; ++i) delta[i] *= w;
    blocks.backward(part, s.parameters(k), true, s.lambda(), true);
  }

  // lambda += H_k times the vector, forward over reverse, on what the inner step left.
  void add_hessian_product(int k) const {
    const Part<T> part = head(support(k));
    const Moving& r = layout.moving[depth - 1];
    blocks.tangent_forward(part, s.parameters(k), s.vector());
    TaskLoss<T> loss = support_loss(k);
    loss.forward(output(part));
    loss.tangent(workspace + r.output, workspace + r.output_delta);
    blocks.tangent_backward(part, s.parameters(k), s.vector(), s.lambda());
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
