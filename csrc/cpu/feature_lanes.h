// The engine of lanes over features: one task at a time, a vector is a piece of a matrix's row.
//
// Rows are padded to whole vectors. What stands in the padding reaches no result: A's elements
// are broadcast one by one, and sums along a row leave the padding out.
#pragma once

#include <cstdint>

#include "../network.h"
#include "dots.h"
#include "interpreter.h"
#include "lane_sums.h"
#include "parts.h"
#include "strips.h"
#include "transpose.h"

namespace fastmeta::FASTMETA_NAMESPACE {

template <class T>
class FeatureLanes {
 public:
  using Scalar = T;
  using Num = typename Vector<T>::type;
  using Place = OnHost;
  static constexpr int count = 1, width = width_of<Num>;
  static constexpr bool takes_together = true;
  static constexpr bool takes_products = false;  // of the dual form, made by others
  static constexpr bool takes_programs = true;   // of expressions
  static constexpr bool takes_graphs = true;     // of layers, with norms of examples

  // `storage` is aligned to a vector; the sums over tasks are added to `sums`.
  FeatureLanes(void* storage, const LayoutIn<OnHost>& layout, int64_t task, const Data<T>& data, T* sums)
      : storage_(static_cast<T*>(storage)),
        scratch_(storage_ + layout.scratch),
        task_(task),
        data_(data),
        weight_(data.task_weights[task]),
        sums_(sums) {}

  template <class Use>
  void share(int parts, Use use) const {
    cpu::share(parts, use);
  }
  // For the chunks that see the storage so.
  FeatureLanes of_part(const LayoutIn<OnHost>& layout) const {
    return {storage_, layout, task_, data_, sums_};
  }

  // Inputs [N, D]: a copy in `to`, or where they are if it has no place. There they are read number
  // by number, so that nothing past their end is.
  View inputs(View to, Global<const T> from) {
    if (to.row_stride > 0) {
      load(to, from);
      return to;
    }
    const T* source = from.data + task_ * from.task_stride;
    return {source - storage_, to.rows, to.cols, to.cols, 1};
  }

  // The inputs [G N, D] of tasks that follow each other, where they are.
  View inputs_together(View one, int rows, Global<const T> from) {
    const T* source = from.data + task_ * from.task_stride;
    return {source - storage_, rows, one.cols, one.cols, 1};
  }

  __attribute__((noinline)) void load(View to, Global<const T> from) {
    const T* source = from.data + task_ * from.task_stride;
    T* out = storage_ + to.offset;
    if (!is_transposed(to)) {
      for (int i = 0; i < to.rows; ++i)
        load_row(out + i * to.row_stride, source + int64_t(i) * to.cols, to.cols);
    } else if (to.cols == 1) {
      load_row(out, source, to.rows);
    } else {
      transposed_parts<false, Num>(
          source, to.cols, to.rows, to.cols,
          [&](int64_t j, int i, Num part) { *vector(out + j * to.col_stride + i) = part; });
    }
  }

  void store(Global<T> to, View from) {
    T* out = to.data + task_ * to.task_stride;
    rows_of(from, [&](int64_t place, Num part, int live) { store_part(out + place, part, live); });
  }

  // Class labels [N] as rows of probabilities, and example weights without the ignored ones.
  void load_labels(View rows, View weights, Global<const int64_t> labels, int64_t ignore,
                   T smoothing) {
    const int64_t* label = labels.data + task_ * labels.task_stride;
    const T rest = smoothing / T(rows.cols);
    T* weight = storage_ + weights.offset;
    for (int i = 0; i < rows.rows; ++i) {
      const bool real = weight[i] > T(0) && label[i] != ignore;
      weight[i] = T(real);
      T* row = storage_ + rows.offset + int64_t(i) * rows.row_stride;
      for (int j = 0; j < rows.row_stride; ++j) row[j] = real && j < rows.cols ? rest : T(0);
      if (real && label[i] >= 0 && label[i] < rows.cols) row[label[i]] += T(1) - smoothing;
    }
  }

  Num weight() const { return Num{} + weight_; }
  // A transposed matrix is summed as it lies.
  void sum_tasks(int64_t start, View from, Num weight) {
    if (is_transposed(from)) return sum_tasks(start, transposed(from), weight);
    for (int i = 0; i < from.rows; ++i) {
      const T* row = storage_ + from.offset + int64_t(i) * from.row_stride;
      T* out = sums_ + start + int64_t(i) * from.cols;
      for (int j = 0; j < from.cols; j += width) {
        const int live = from.cols - j;
        store_part(out + j, load_part<Num>(out + j, live) + *vector(row + j) * weight, live);
      }
    }
  }
  // Where the first weight's sums lie, if that is in whole vectors; else of no rows.
  View sums_like(View weight) const {
    if (!is_transposed(weight) || weight.rows % width != 0) return {};
    return {sums_ - storage_, weight.rows, weight.cols, 1, weight.rows};
  }
  // The sums of a weight [H, D] as torch has it.
  static void unpack(T* to, const T* sums, int rows, int cols) {
    transposed_parts<false, Num>(sums, rows, cols, rows, [&](int64_t h, int d, Num part) {
      store_part(to + h * cols + d, part, cols - d);
    });
  }

  // f(sum, out, in...) over C = A B, and over A B + A2 B2.
  template <class F, class... Views>
  void mm(F f, View out, View a, View b, Views... in) {
    if (is_transposed(out)) return mm(f, transposed(out), transposed(b), transposed(a), transposed(in)...);
    if (is_transposed(b) && a.col_stride == 1 && dots_pay<Num>(b.cols, b.rows)) {
      const Dots<T> rows{storage_ + a.offset, a.row_stride, storage_ + b.offset, b.col_stride,
                         a.rows, b.cols, a.cols};
      return dots<Num>(rows, budget_, finishing(f, out, in...));
    }
    run(f, Sum<T>{{factors(a, b, out, scratch_)}, 1}, out, in...);
  }
  template <class F, class... Views>
  void mm2(F f, View out, View a, View b, View a2, View b2, Views... in) {
    if (is_transposed(out)) {
      return mm2(f, transposed(out), transposed(b), transposed(a), transposed(b2), transposed(a2), transposed(in)...);
    }
    const Factors<T> first = factors(a, b, out, scratch_);
    run(f, Sum<T>{{first, factors(a2, b2, out, scratch_ + b.rows * int64_t(out.row_stride))}, 2},
        out, in...);
  }

  // f(out, in...) for every entry.
  template <class F, class... Views>
  void map(F f, View out, Views... in) {
    if (is_transposed(out)) return map(f, transposed(out), transposed(in)...);
    // Where all lie alike, or are one scalar, the whole is one row.
    if (out.rows > 1 && out.col_stride == 1 && ((alike(out, in) || is_scalar(in)) && ...)) {
      const int size = out.rows * out.row_stride;
      return map(f, View{out.offset, 1, size, size, 1},
                 View{in.offset, 1, size, size, is_scalar(in) ? 0 : 1}...);
    }
    const int vectors = vectors_of(out.cols);
    for (int i = 0; i < out.rows; ++i)
      row(f, vectors, Row(storage_, out, i), Row(storage_, in, i)...);
  }

  // f(sum, out, in...) with the sum over each column of `a`.
  template <class F, class... Views>
  void sum_rows(F f, View out, View a, Views... in) {
    const T* values = storage_ + a.offset;
    const auto sum = [&](int64_t j, auto&... parts) {
      Num total{};
      for (int i = 0; i < a.rows; ++i)
        total += *vector(values + int64_t(i) * a.row_stride + j * width);
      f(total, parts[j]...);
    };
    columns(sum, vectors_of(a.cols), Row(storage_, out, 0), Row(storage_, in, 0)...);
  }

  // out[i]: f(out, in...) along a row. Lanes over rows here, so that f needs no lanes combined.
  template <class F, class... Views>
  void fold_cols(View out, F f, T start, View first, Views... in) {
    for (int i = 0; i < first.rows; i += width) {
      Num sum = Num{} + start;
      for (int j = 0; j < first.cols; j += width) {
        const int live = first.cols - j < width ? first.cols - j : width;
        fold_block(f, sum, live, Block(storage_, first, i, j), Block(storage_, in, i, j)...);
      }
      *vector(storage_ + out.offset + i) = sum;
    }
  }
  // out[i]: the sum of f(in...) along a row.
  template <class F, class... Views>
  void sum_cols(View out, F f, View first, Views... in) {
    for (int i = 0; i < first.rows; i += width) {
      Num sums[width];
      for (int r = 0; r < width; ++r) {
        sums[r] = i + r < first.rows ? row_sum(f, first.cols, Row(storage_, first, i + r),
                                               Row(storage_, in, i + r)...)
                                     : Num{};
      }
      *vector(storage_ + out.offset + i) = lane_sums(sums);
    }
  }
  // out[j]: f(out, in...) down a column.
  template <class F, class... Views>
  void fold_rows(View out, F f, T start, View first, Views... in) {
    for (int j = 0; j < vectors_of(first.cols); ++j) {
      Num sum = Num{} + start;
      for (int i = 0; i < first.rows; ++i) {
        fold_row(f, sum, j, Row(storage_, first, i), Row(storage_, in, i)...);
      }
      *vector(storage_ + out.offset + j * width) = sum;
    }
  }

  void evaluate(const Program& program, int examples, const View* matrices) {
    Interpreter<T, Num, T>(program, storage_, examples).run(matrices);
  }

  void dot(View out, View a, View b) {
    if (is_transposed(a)) return dot(out, transposed(a), transposed(b));
    const int whole = a.cols / width, rest = a.cols % width;
    Num sum{};
    for (int i = 0; i < a.rows; ++i) {
      const Num* left = vector(storage_ + a.offset + int64_t(i) * a.row_stride);
      const Num* right = vector(storage_ + b.offset + int64_t(i) * b.row_stride);
      for (int j = 0; j < whole; ++j) sum += left[j] * right[j];
      if (rest > 0) sum += select(iota<Num>() < rest, left[whole] * right[whole], Num{});
    }
    T total = 0;
    for (int lane = 0; lane < width; ++lane) total += sum[lane];
    *vector(storage_ + out.offset) = Num{} + total;
  }

 private:
  T* storage_;
  T* scratch_;
  int64_t task_;
  const Data<T>& data_;
  T weight_;
  T* sums_;
  cpu::Budget& budget_ = cpu::budget();

  static Num* vector(T* at) { return reinterpret_cast<Num*>(at); }
  static const Num* vector(const T* at) { return reinterpret_cast<const Num*>(at); }
  static int vectors_of(int cols) { return (cols + width - 1) / width; }

  // Whether a matrix lies column by column; it is then taken as its transpose.
  static bool is_transposed(View v) { return v.row_stride == 1 && v.col_stride > 1; }
  static View transposed(View v) { return {v.offset, v.cols, v.rows, v.col_stride, v.row_stride}; }
  static bool is_scalar(View v) { return v.row_stride == 0 && v.col_stride == 0; }
  static bool alike(View a, View b) { return a.row_stride == b.row_stride && b.col_stride == 1; }

  // Row i of a matrix by vectors; one scalar, repeated, where its columns do not lie side by side.
  struct Row {
    Num repeated;
    Num* data;
    int64_t step;
    Row(T* storage, View v, int i) {
      T* start = storage + v.offset + int64_t(i) * v.row_stride;
      const bool repeats = v.col_stride != 1;
      if (repeats) repeated = Num{} + *start;
      data = repeats ? &repeated : vector(start);
      step = repeats ? 0 : 1;
    }
    Row(const Row&) = delete;
    Num& operator[](int64_t j) { return data[j * step]; }
  };

  // Rows i ... and columns j ... of a matrix, as columns of `width` rows.
  struct Block {
    Num part[width];
    __attribute__((noinline)) Block(T* storage, View v, int i, int j) {
      T* corner = storage + v.offset + int64_t(i) * v.row_stride + int64_t(j) * v.col_stride;
      if (v.row_stride == 1 && v.col_stride != 1) {
        for (int c = 0; c < width; ++c) part[c] = *vector(corner);
      } else if (v.row_stride == 0) {
        for (int c = 0; c < width; ++c) part[c] = Num{} + corner[c * v.col_stride];
      } else {
        const int rows = v.rows - i < width ? v.rows - i : width;
        transposed_parts<true, Num>(corner, v.row_stride, rows, width,
                                    [this](int c, int, Num column) { part[c] = column; });
      }
    }
  };

  template <class F, class... Rows>
  static void columns(F f, int vectors, Rows&&... rows) {
    for (int j = 0; j < vectors; ++j) f(j, rows...);
  }
  template <class F, class... Rows>
  static void row(F f, int vectors, Rows&&... rows) {
    for (int j = 0; j < vectors; ++j) f(rows[j]...);
  }
  template <class F, class... Rows>
  static Num row_sum(F f, int cols, Rows&&... rows) {
    const int whole = cols / width, rest = cols % width;
    Num sum{};
    for (int j = 0; j < whole; ++j) sum += f(rows[j]...);
    return rest > 0 ? sum + select(iota<Num>() < rest, f(rows[whole]...), Num{}) : sum;
  }
  template <class F, class... Rows>
  static void fold_row(F f, Num& sum, int j, Rows&&... rows) {
    f(sum, rows[j]...);
  }
  template <class F, class... Blocks>
  static void fold_block(F f, Num& sum, int cols, const Blocks&... blocks) {
    for (int j = 0; j < cols; ++j) f(sum, blocks.part[j]...);
  }
  template <class F, class... Rows>
  static void finish(F f, const Num* sums, int from, int vectors, Rows&&... rows) {
    for (int c = 0; c < vectors; ++c) f(sums[c], rows[from + c]...);
  }

  static void load_row(T* to, const T* from, int size) {
    for (int j = 0; j < size; j += width) *vector(to + j) = load_part<Num>(from + j, size - j);
  }

  // use(place, part, live) for all elements of a matrix, in torch's order.
  template <class Use>
  void rows_of(View v, Use use) {
    const T* values = storage_ + v.offset;
    if (is_transposed(v) && v.cols > 1) {
      transposed_parts<true, Num>(
          values, v.col_stride, v.cols, v.rows,
          [&](int64_t i, int j, Num part) { use(i * v.cols + j, part, v.cols - j); });
      return;
    }
    const int rows = is_transposed(v) ? 1 : v.rows, cols = is_transposed(v) ? v.rows : v.cols;
    for (int i = 0; i < rows; ++i) {
      const T* row = values + int64_t(i) * v.row_stride;
      for (int j = 0; j < cols; j += width) use(int64_t(i) * cols + j, *vector(row + j), cols - j);
    }
  }

  // Where the columns of B do not lie side by side, they are laid so in `panel`.
  static Factors<T> factors_of(View a, const T* at, const T* b, int64_t b_stride) {
    const bool far = int64_t(a.rows) * a.cols * int(sizeof(T)) > kLargestA;
    return {at, a.row_stride, a.col_stride, b, b_stride, a.cols, far};
  }
  Factors<T> factors(View a, View b, View out, T* panel) {
    const T* values = storage_ + b.offset;
    if (b.col_stride == 1) return factors_of(a, storage_ + a.offset, values, b.row_stride);
    lay_out(panel, out.row_stride, b);
    return factors_of(a, storage_ + a.offset, panel, out.row_stride);
  }
  __attribute__((noinline)) void lay_out(T* panel, int64_t stride, View b) {
    transposed_parts<true, Num>(
        storage_ + b.offset, b.col_stride, b.cols, b.rows,
        [&](int64_t k, int j, Num part) { *vector(panel + k * stride + j) = part; });
  }

  template <class F, class... Views>
  void run(F f, Sum<T> terms, View out, Views... in) {
    terms.out = storage_ + out.offset, terms.out_row = out.row_stride;
    strips<Num>(terms, out.rows, vectors_of(out.cols), budget_, finishing(f, out, in...));
  }
  // For some rows of a product at a time, and vectors from the j-th on: f(sum, out, in...).
  template <class F, class... Views>
  auto finishing(const F& f, const View& out, const Views&... in) {
    return [&](int i, int rows, int j, int vectors, const Num* sums) {
      for (int r = 0; r < rows; ++r) {
        finish(f, sums + r * vectors, j, vectors, Row(storage_, out, i + r),
               Row(storage_, in, i + r)...);
      }
    };
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
