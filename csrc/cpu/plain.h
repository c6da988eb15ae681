// The plain engine: a number is a number, one task at a time; the slow twin of every other.
#pragma once

#include <cstdint>

#include "../network.h"
#include "../scalars.h"
#include "interpreter.h"
#include "parts.h"
#include "spend.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class T>
class Plain {
 public:
  using Scalar = T;
  using Num = T;
  using Place = OnHost;
  static constexpr int count = 1, width = 1;
  static constexpr bool takes_together = false;
  static constexpr bool takes_products = false;  // of the dual form, made by others
  static constexpr bool takes_programs = true;   // of expressions
  static constexpr bool takes_graphs = true;     // of layers, with norms of examples

  Plain(void* storage, const LayoutIn<OnHost>&, int64_t task, const Data<T>& data, T* partial)
      : storage_(static_cast<T*>(storage)), task_(task), data_(data), partial_(partial) {}
  template <class Use>
  void share(int parts, Use use) const {
    cpu::share(parts, use);
  }
  // For the chunks that see the storage so.
  Plain of_part(const LayoutIn<OnHost>& layout) const {
    return {storage_, layout, task_, data_, partial_};
  }

  View inputs_together(View to, int, Global<const T> from) { return inputs(to, from); }
  View inputs(View to, Global<const T> from) {
    load(to, from);
    return to;
  }
  void load(View to, Global<const T> from) {
    for (int64_t i = 0; i < int64_t(to.rows) * to.cols; ++i) {
      storage_[to.offset + i] = from.data[task_ * from.task_stride + i];
    }
  }

  void store(Global<T> to, View from) {
    for (int64_t i = 0; i < int64_t(from.rows) * from.cols; ++i) {
      to.data[task_ * to.task_stride + i] = storage_[from.offset + i];
    }
  }

  void load_labels(View rows, View weights, Global<const int64_t> labels, int64_t ignore,
                   T smoothing) {
    for (int i = 0; i < rows.rows; ++i) {
      const int64_t label = labels.data[task_ * labels.task_stride + i];
      const bool real = at(weights, i, 0) > 0 && label != ignore;
      at(weights, i, 0) = real;
      for (int j = 0; j < rows.cols; ++j) {
        at(rows, i, j) = real ? smoothing / rows.cols + (label == j ? 1 - smoothing : 0) : 0;
      }
    }
  }

  Num weight() const { return data_.task_weights[task_]; }
  View sums_like(View) const { return {}; }
  void sum_tasks(int64_t place, View from, Num weight) {
    for (int64_t i = 0; i < int64_t(from.rows) * from.cols; ++i) {
      partial_[place + i] += storage_[from.offset + i] * weight;
    }
  }

  template <class F, class... Views>
  void mm(F f, View out, View a, View b, Views... in) {
    for (int i = 0; i < out.rows; ++i) {
      for (int j = 0; j < out.cols; ++j) f(product(a, b, i, j), at(out, i, j), at(in, i, j)...);
      spend(budget_, int64_t(out.cols) * a.cols);
    }
  }
  template <class F, class... Views>
  void mm2(F f, View out, View a, View b, View a2, View b2, Views... in) {
    for (int i = 0; i < out.rows; ++i) {
      for (int j = 0; j < out.cols; ++j) {
        f(product(a, b, i, j) + product(a2, b2, i, j), at(out, i, j), at(in, i, j)...);
      }
      spend(budget_, int64_t(out.cols) * (a.cols + a2.cols));
    }
  }

  template <class F, class... Views>
  void map(F f, View out, Views... in) {
    for (int i = 0; i < out.rows; ++i) {
      for (int j = 0; j < out.cols; ++j) f(at(out, i, j), at(in, i, j)...);
    }
  }

  template <class F, class... Views>
  void sum_rows(F f, View out, View a, Views... in) {
    for (int j = 0; j < a.cols; ++j) {
      T sum = 0;
      for (int i = 0; i < a.rows; ++i) sum += at(a, i, j);
      f(sum, at(out, 0, j), at(in, 0, j)...);
    }
  }

  template <class F, class... Views>
  void fold_cols(View out, F f, T start, View first, Views... in) {
    for (int i = 0; i < first.rows; ++i) {
      T sum = start;
      for (int j = 0; j < first.cols; ++j) f(sum, at(first, i, j), at(in, i, j)...);
      at(out, i, 0) = sum;
    }
  }
  // out[i]: the sum of f(in...) along a row.
  template <class F, class... Views>
  void sum_cols(View out, F f, View first, Views... in) {
    fold_cols(out, [f](auto& sum, auto... values) { sum += f(values...); }, T(0), first, in...);
  }
  template <class F, class... Views>
  void fold_rows(View out, F f, T start, View first, Views... in) {
    for (int j = 0; j < first.cols; ++j) {
      T sum = start;
      for (int i = 0; i < first.rows; ++i) f(sum, at(first, i, j), at(in, i, j)...);
      at(out, 0, j) = sum;
    }
  }

  void evaluate(const Program& program, int examples, const View* matrices) {
    Interpreter<T, T, T>(program, storage_, examples).run(matrices);
  }

  void dot(View out, View a, View b) {
    T sum = 0;
    for (int i = 0; i < a.rows; ++i) {
      for (int j = 0; j < a.cols; ++j) sum += at(a, i, j) * at(b, i, j);
    }
    at(out, 0, 0) = sum;
  }

 private:
  T* storage_;
  int64_t task_;
  const Data<T>& data_;
  T* partial_;
  cpu::Budget& budget_ = cpu::budget();

  T& at(View v, int64_t i, int64_t j) const {
    return storage_[v.offset + i * v.row_stride + j * v.col_stride];
  }
  T product(View a, View b, int i, int j) const {
    T sum = 0;
    for (int k = 0; k < a.cols; ++k) sum += at(a, i, k) * at(b, k, j);
    return sum;
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
