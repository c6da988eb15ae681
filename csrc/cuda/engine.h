// The engine of a thread block: one task at a time, its matrices in shared memory where they fit.
//
// Every operation is made by all threads together and ends with a barrier: what it wrote is seen by
// the next, and what it read may be overwritten by the next.
#pragma once

#include <cstdint>

#include "call.h"
#include "machine.h"
#include "product.h"

namespace fastmeta::FASTMETA_NAMESPACE {

using cuda::barrier;

// The barriers, numbered for the tests.
enum Site {
  kLoad, kStore, kLabels, kSummedTasks, kProduct, kMap, kSummedRows, kCols, kRow,
  kDotParts, kDot, kSlicesMade
};

// Where a task's matrices lie. A few elements of shared memory in front are the engine's own.
struct InShared {
  template <class T>
  FASTMETA_DEVICE static T* storage(const cuda::Call<T>&) {
    return cuda::shared<T>() + cuda::kScratch;
  }
};
struct InWorkspace {
  template <class T>
  FASTMETA_DEVICE static T* storage(const cuda::Call<T>& call) {
    return call.workspace + cuda::block() * call.image->layout.size;
  }
};

template <class T, class Memory>
class Block {
 public:
  using Scalar = T;
  using Num = T;
  using Place = cuda::OnDevice;
  static constexpr bool takes_programs = false;  // of expressions
  static constexpr bool takes_graphs = false;    // of layers, with norms of examples
  static constexpr bool takes_products = true;

  // Sums over tasks are added to `sums`.
  FASTMETA_DEVICE Block(const cuda::Call<T>& call, int64_t task, T* sums)
      : call_(call), task_(task), sums_(sums) {}

  FASTMETA_DEVICE View inputs(View to, Global<const T> from) {
    if (to.cols > 0) load(to, from);
    return to;
  }
  FASTMETA_DEVICE void load(View to, Global<const T> from) {
    const T* const values = from.data + task_ * from.task_stride;
    walk(to, [&](int i, int j) { at(to, i, j) = values[int64_t(i) * to.cols + j]; });
    barrier(kLoad);
  }
  FASTMETA_DEVICE void store(Global<T> to, View from) {
    T* const values = to.data + task_ * to.task_stride;
    walk(from, [&](int i, int j) { values[int64_t(i) * from.cols + j] = at(from, i, j); });
    barrier(kStore);
  }

  // Class labels [N] as rows of probabilities, and weights that are 1, or 0 where one is ignored. One
  // that is no class makes its example's weight no number, and with that the task's loss.
  FASTMETA_DEVICE void load_labels(View rows, View weights, Global<const int64_t> labels,
                                   int64_t ignore, T smoothing) {
    const int64_t* const classes = labels.data + task_ * labels.task_stride;
    const auto is_real = [&](int i) { return at(weights, i, 0) > T(0) && classes[i] != ignore; };
    const T rest = smoothing / T(rows.cols);
    walk(rows, [&](int i, int j) {
      at(rows, i, j) = is_real(i) ? rest + (classes[i] == j ? T(1) - smoothing : T(0)) : T(0);
    });
    // What was real stays it, so that no thread has to wait.
    walk(weights, [&](int i, int) {
      const bool wrong = uint64_t(classes[i]) >= uint64_t(rows.cols);
      const T each = wrong ? T(0) / T(0) : T(1);
      at(weights, i, 0) = is_real(i) ? each : T(0);
    });
    barrier(kLabels);
  }

  FASTMETA_DEVICE Num weight() const { return call_.task_weights[task_]; }
  FASTMETA_DEVICE void sum_tasks(int64_t place, View from, Num weight) {
    walk(from, [&](int i, int j) {
      sums_[place + int64_t(i) * from.cols + j] += at(from, i, j) * weight;
    });
    barrier(kSummedTasks);
  }

  template <class F, class... Views>
  FASTMETA_DEVICE void mm(F f, View out, View a, View b, Views... in) {
    const Factors factors[] = {{a, b}};
    multiply(f, out, factors, in...);
  }
  template <class F, class... Views>
  FASTMETA_DEVICE void mm2(F f, View out, View a, View b, View a2, View b2, Views... in) {
    const Factors factors[] = {{a, b}, {a2, b2}};
    multiply(f, out, factors, in...);
  }

  template <class F, class... Views>
  FASTMETA_DEVICE void map(F f, View out, Views... in) {
    walk(out, [&](int i, int j) { f(at(out, i, j), at(in, i, j)...); });
    barrier(kMap);
  }

  template <class F, class... Views>
  FASTMETA_DEVICE void sum_rows(F f, View out, View a, Views... in) {
#pragma unroll 1
    for (int j = cuda::thread(); j < a.cols; j += cuda::threads()) {
      T sum = 0;
      for (int i = 0; i < a.rows; ++i) sum += at(a, i, j);
      f(sum, at(out, 0, j), at(in, 0, j)...);
    }
    barrier(kSummedRows);
  }

  template <class F, class... Views>
  FASTMETA_DEVICE void fold_cols(View out, F f, T start, View first, Views... in) {
#pragma unroll 1
    for (int i = cuda::thread(); i < first.rows; i += cuda::threads()) {
      T sum = start;
      for (int j = 0; j < first.cols; ++j) f(sum, at(first, i, j), at(in, i, j)...);
      at(out, i, 0) = sum;
    }
    barrier(kCols);
  }
  template <class F, class... Views>
  FASTMETA_DEVICE void fold_rows(View out, F f, T start, View first, Views... in) {
#pragma unroll 1
    for (int j = cuda::thread(); j < first.cols; j += cuda::threads()) {
      T sum = start;
      for (int i = 0; i < first.rows; ++i) f(sum, at(first, i, j), at(in, i, j)...);
      at(out, 0, j) = sum;
    }
    barrier(kRow);
  }

  FASTMETA_DEVICE void dot(View out, View a, View b) {
    T sum = 0;
    walk(a, [&](int i, int j) { sum += at(a, i, j) * at(b, i, j); });
    for (int bit = 16; bit > 0; bit /= 2) sum += cuda::from_lane_across(sum, bit);
    const int warps = cuda::threads() / 32;
    T* const parts = cuda::shared<T>();
    if (cuda::thread() % 32 == 0) parts[cuda::thread() / 32] = sum;
    barrier(kDotParts);
    if (cuda::thread() == 0) {
      sum = 0;
      for (int warp = 0; warp < warps; ++warp) sum += parts[warp];
      at(out, 0, 0) = sum;
    }
    barrier(kDot);
  }

  // The dual form's products with the inputs, and its cotangents, which others make. That of the query
  // set is large and seldom needed: it is loaded where it is.
  FASTMETA_DEVICE void load_query_product(View to) { load(to, call_.products.query); }
  FASTMETA_DEVICE void load_products(const DualViews& place, bool moves) {
    load(place.support, call_.products.support);
    if (!moves) return;
    load(place.gram, call_.products.gram);
    load(place.cross, call_.products.cross);
  }
  FASTMETA_DEVICE void store_cotangents(const DualViews& place) {
    store(call_.products.of_support, place.of_support);
    store(call_.products.of_query, place.of_query);
  }

 private:
  const cuda::Call<T>& call_;
  const int64_t task_;
  T* const sums_;

  FASTMETA_DEVICE T& at(View v, int i, int j) const {
    return Memory::storage(call_)[place(v, i, j)];
  }
  FASTMETA_DEVICE static int place(View v, int i, int j) {
    return int(v.offset) + i * v.row_stride + j * v.col_stride;
  }

  // use(i, j) for all elements of a matrix: neighbouring threads take neighbouring columns, as many
  // as there are up to a power of two, because that needs no division.
  template <class Use>
  FASTMETA_DEVICE static void walk(View v, Use use) {
    const int most = cuda::log2_above(cuda::threads()), wanted = cuda::log2_above(v.cols);
    const int shift = wanted < most ? wanted : most;
    const int col = cuda::thread() & ((1 << shift) - 1);
#pragma unroll 1
    for (int i = cuda::thread() >> shift; i < v.rows; i += cuda::threads() >> shift) {
#pragma unroll 1
      for (int j = col; j < v.cols; j += 1 << shift) use(i, j);
    }
  }

  template <class F, int count, class... Views>
  FASTMETA_ONCE void multiply(F f, View out, const Factors (&factors)[count], Views... in) {
    const bool all_float4 = (is_float4(out) && ... && is_float4(in));
    product<T>(
        Memory::storage(call_), out.rows, out.cols, factors, call_.tf32,
        [&](T sum, int i, int j) { f(sum, at(out, i, j), at(in, i, j)...); },
        [&](auto sums, int i, int j) {
          if (all_float4) return change_float4(f, sums, i, j, out, in...);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (j + n < out.cols) f(sums.of[n], at(out, i, j + n), at(in, i, j + n)...);
          }
        });
    barrier(kProduct);
  }

  // From j on in row i, beyond the last column too: what lies there is padding.
  template <class F, class... Views>
  FASTMETA_DEVICE void change_float4(F f, const Float4& sums, int i, int j, View out,
                                   Views... in) const {
    float* const storage = Memory::storage(call_);
    const auto change = [&](Float4 four, auto... others) {
#pragma unroll
      for (int n = 0; n < 4; ++n) f(sums.of[n], four.of[n], others.of[n]...);
      cuda::put_float4(storage, place(out, i, j), four);
    };
    change(float4_at(storage, place(out, i, j)), float4_at(storage, place(in, i, j))...);
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
