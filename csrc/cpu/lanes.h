// The engine of lanes: a number is a vector, each lane of it one task.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../epilogues.h"
#include "../network.h"
#include "interpreter.h"
#include "lane_sums.h"
#include "math.h"
#include "parts.h"
#include "product.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class T>
class Lanes {
 public:
  using Scalar = T;
  using Num = typename Vector<T>::type;
  using Place = OnHost;
  static constexpr int count = sizeof(Num) / sizeof(T), width = 1;
  static constexpr bool takes_together = false;
  static constexpr bool takes_products = false;  // of the dual form, made by others
  static constexpr bool takes_programs = true;   // of expressions
  static constexpr bool takes_graphs = true;     // of layers, with norms of examples

  // `storage` is this group's, aligned to a vector; its sums over tasks are added to
  // `partial`.
  Lanes(void* storage, const LayoutIn<OnHost>& layout, int64_t first_task, const Data<T>& data, T* partial)
      : storage_(static_cast<Num*>(storage)),
        layout_(layout),
        first_(first_task),
        data_(data),
        partial_(partial) {
    const int64_t left = data.tasks - first_task;
    live_ = left < count ? int(left) : count;
    // Lanes past the last task repeat it at weight zero, so that they compute on valid data.
    for (int lane = 0; lane < count; ++lane) {
      weights_[lane] = lane < live_ ? data.task_weights[first_ + lane] : T(0);
    }
  }

  template <class Use>
  void share(int parts, Use use) const {
    cpu::share(parts, use);
  }
  // For the chunks that see the storage so.
  Lanes of_part(const LayoutIn<OnHost>& layout) const {
    return {storage_, layout, first_, data_, partial_};
  }

  View inputs_together(View to, int, Global<const T> from) { return inputs(to, from); }
  View inputs(View to, Global<const T> from) {
    load(to, from);
    return to;
  }
  void load(View to, Global<const T> from) {
    Num* out = storage_ + to.offset;
    const int64_t size = int64_t(to.rows) * to.cols;
    if (from.task_stride == 0) {
      for (int64_t i = 0; i < size; ++i) out[i] = from.data[i] - Num{};  // which keeps -0
      return;
    }
    const int64_t whole = size / count * count;
    for (int64_t i = 0; i < whole; i += count) {
      Num block[count];
#pragma GCC unroll 16
      for (int lane = 0; lane < count; ++lane) {
        block[lane] = load_part<Num>(from.data + task_of(lane) * from.task_stride + i, count);
      }
      exchange<1>(block);
#pragma GCC unroll 16
      for (int j = 0; j < count; ++j) out[i + j] = block[j];
    }
    for (int lane = 0; lane < count && whole < size; ++lane) {
      const T* task = from.data + task_of(lane) * from.task_stride;
      T* column = reinterpret_cast<T*>(out) + lane;
      for (int64_t i = whole; i < size; ++i) column[i * count] = task[i];
    }
  }

  void store(Global<T> to, View from) {
    const Num* vectors = storage_ + from.offset;
    const T* values = reinterpret_cast<const T*>(vectors);
    const int64_t size = int64_t(from.rows) * from.cols, whole = size / count * count;
    for (int64_t i = 0; i < whole; i += count) {
      Num block[count];
#pragma GCC unroll 16
      for (int j = 0; j < count; ++j) block[j] = vectors[i + j];
      exchange<1>(block);
      for (int lane = 0; lane < live_; ++lane) {
        store_part(to.data + (first_ + lane) * to.task_stride + i, block[lane], count);
      }
    }
    for (int lane = 0; lane < live_ && whole < size; ++lane) {
      T* task = to.data + (first_ + lane) * to.task_stride;
      for (int64_t i = whole; i < size; ++i) task[i] = values[i * count + lane];
    }
  }

  // Class labels [N] as rows of probabilities, and weights that are 1, or 0 where one is ignored.
  void load_labels(View rows, View weights, Global<const int64_t> labels, int64_t ignore,
                   T smoothing) {
    const T rest = smoothing / T(rows.cols);
    Num* out = storage_ + rows.offset;
    Num* weight = storage_ + weights.offset;
    for (int lane = 0; lane < count; ++lane) {
      const int64_t* task = labels.data + task_of(lane) * labels.task_stride;
      for (int i = 0; i < rows.rows; ++i) {
        const bool real = weight[i][lane] > T(0) && task[i] != ignore;
        weight[i][lane] = T(real);
        for (int j = 0; j < rows.cols; ++j) {
          out[i * rows.cols + j][lane] =
              real ? rest + (task[i] == j ? T(1) - smoothing : T(0)) : T(0);
        }
      }
    }
  }

  Num weight() const { return weights_; }
  View sums_like(View) const { return {}; }
  void sum_tasks(int64_t place, View from, Num weight) {
    const Num* values = storage_ + from.offset;
    T* const sums = partial_ + place;
    const int64_t size = int64_t(from.rows) * from.cols, whole = size / count * count;
    for (int64_t i = 0; i < whole; i += count) {
      store_part(sums + i, load_part<Num>(sums + i, count) + lane_sums(values + i, weight), count);
    }
    if (whole == size) return;
    Num rest[count]{};
    for (int64_t i = whole; i < size; ++i) rest[i - whole] = values[i];
    const Num total = lane_sums(rest, weight);
    for (int64_t i = whole; i < size; ++i) sums[i] += total[i - whole];
  }

  // f(sum, out, in...) over C = A B, and over A B + A2 B2.
  template <class F, class... Views>
  void mm(F f, View out, View a, View b, Views... in) {
    if (a.cols == 1) return outer(f, at(a), b, out.rows, out.cols, at(out), at(in)...);
    const Terms<Num> terms{{at(a)}, {at(b)}, {shared(b)}, {a.cols}, 1};
    run(f, terms, out.rows, out.cols, at(out), at(in)...);
  }
  template <class F, class... Views>
  void mm2(F f, View out, View a, View b, View a2, View b2, Views... in) {
    if constexpr (std::is_same_v<F, Keep>) {
      // One after the other, where A and A2 would push each other out of the first cache.
      if (out.cols > 1 && out.rows * (a.cols + a2.cols) > kNumbersOfA) {
        mm(f, out, a, b);
        return mm(Add<T>{1}, out, a2, b2);
      }
    }
    const Terms<Num> terms{
        {at(a), at(a2)}, {at(b), at(b2)}, {shared(b), shared(b2)}, {a.cols, a2.cols}, 2};
    run(f, terms, out.rows, out.cols, at(out), at(in)...);
  }

  // f(out, in...) for every entry.
  template <class F, class... Views>
  void map(F f, View out, Views... in) {
    entries(f, out.rows, out.cols, at(out), at(in)...);
  }

  // f(sum, out, in...) with the sum over each column of `a`.
  template <class F, class... Views>
  void sum_rows(F f, View out, View a, Views... in) {
    sums(f, at(a), a.rows, a.cols, at(out), at(in)...);
  }

  // out[i] and out[j]: f(out, in...) along a row, down a column.
  template <class F, class... Views>
  void fold_cols(View out, F f, T start, View first, Views... in) {
    fold(f, start, first.rows, first.cols, at(out), at(first), at(in)...);
  }
  // out[i]: the sum of f(in...) along a row.
  template <class F, class... Views>
  void sum_cols(View out, F f, View first, Views... in) {
    fold_cols(out, [f](auto& sum, auto... values) { sum += f(values...); }, T(0), first, in...);
  }
  template <class F, class... Views>
  void fold_rows(View out, F f, T start, View first, Views... in) {
    fold(f, start, first.cols, first.rows, transposed(at(out)), transposed(at(first)), transposed(at(in))...);
  }

  void evaluate(const Program& program, int examples, const View* matrices) {
    Interpreter<T, Num, Num>(program, storage_, examples).run(matrices);
  }

  void dot(View out, View a, View b) {
    Num sum{};
    const Matrix<Num> left = at(a), right = at(b);
    for (int i = 0; i < a.rows; ++i) {
      for (int j = 0; j < a.cols; ++j) sum += left(i, j) * right(i, j);
    }
    storage_[out.offset] = sum;
  }

 private:
  static constexpr int kNumbersOfA = (24 << 10) / sizeof(Num);  // half of the first cache

  Num* storage_;
  const LayoutIn<OnHost>& layout_;
  int64_t first_;
  const Data<T>& data_;
  T* partial_;
  int live_;
  Num weights_;
  cpu::Budget& budget_ = cpu::budget();

  int64_t task_of(int lane) const { return first_ + (lane < live_ ? lane : live_ - 1); }
  // Where the caller has a weight of theta_0, which is the same in all lanes; else null.
  const T* shared(View v) const {
    for (std::size_t l = 0; l < layout_.layers.size(); ++l) {
      const bool is_dual = l == 0 && layout_.dual.weight.rows > 0;
      const Global<const T>& weight = data_.parameters[l * kTensors + kWeight];
      const int64_t place = layout_.layers[l].of[kWeight] + (is_dual ? 0 : layout_.theta);
      if (!weight.given() || v.offset != place) continue;
      return weight.task_stride == 0 ? weight.data : nullptr;
    }
    return nullptr;
  }
  Matrix<Num> at(View v) const { return {storage_ + v.offset, v.row_stride, v.col_stride}; }
  static Matrix<Num> transposed(Matrix<Num> m) { return {m.data, m.col_stride, m.row_stride}; }

  template <class F, class... Matrices>
  void run(F f, const Terms<Num>& terms, int rows, int cols, Matrices... m) const {
    product<FASTMETA_TILE_ROWS, FASTMETA_TILE_COLUMNS>(
        terms, rows, cols, budget_, [f, m...](int i, int j, Num sum) { f(sum, m(i, j)...); });
  }

  // A product whose sums have one term.
  template <class F, class... Matrices>
  void outer(F f, Matrix<Num> a, View b, int rows, int cols, Matrices... m) const {
    const auto multiply = [&](auto right) {
      for (int i = 0; i < rows; ++i) {
        const Num left = a(i, 0);
        for (int j = 0; j < cols; ++j) f(left * right(0, j), m(i, j)...);
      }
      spend(budget_, int64_t(rows) * cols);
    };
    if (const T* values = shared(b)) {
      multiply(Matrix<const T>{values, b.row_stride, b.col_stride});
    } else {
      multiply(at(b));
    }
  }

  template <class F, class... Matrices>
  static void entries(F f, int rows, int cols, Matrices... m) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) f(m(i, j)...);
    }
  }

  template <class F, class... Matrices>
  static void sums(F f, Matrix<Num> a, int rows, int cols, Matrices... m) {
    for (int j = 0; j < cols; ++j) {
      Num sum{};
      for (int i = 0; i < rows; ++i) sum += a(i, j);
      f(sum, m(0, j)...);
    }
  }

  template <class F, class... Matrices>
  static void fold(F f, T start, int rows, int cols, Matrix<Num> out, Matrices... in) {
    for (int i = 0; i < rows; ++i) {
      Num sum = Num{} + start;
      for (int j = 0; j < cols; ++j) f(sum, in(i, j)...);
      out(i, 0) = sum;
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
