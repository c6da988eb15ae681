// One kernel that makes each of the engine's operations twice in a row, on data that the one before
// wrote and over data that it read: what its contract promises to bear.

#define FASTMETA_NAMESPACE cuda_block

#include "cuda/engine.h"

namespace fastmeta::cuda {
namespace {

using namespace cuda_block;
using Num = double;

constexpr int kRows = 7, kCols = 5, kThreads = 64;

struct Case {
  Call<Num> call;
  Num* out;  // [kCounted numbers]
};

View matrix(int number) { return {number * 64, kRows, kCols, kCols, 1}; }
View transposed(View v) { return {v.offset, v.cols, v.rows, v.col_stride, v.row_stride}; }

void operate(Case given) {
  Block<Num, InShared> e(given.call, 0, given.call.partials);
  const View a = matrix(0), b = matrix(1), square{128, kRows, kRows, kRows, 1};
  const View column{192, kRows, 1, 1, 1}, row{200, 1, kCols, kCols, 1}, one{210, 1, 1, 1, 1};
  const View labels = matrix(4), weights{330, kRows, 1, 1, 1}, reversed{4, kRows, kCols, kCols, -1};
  const auto put = [&](int place, View from) {
    e.sum_tasks(place, from, 1);
    // From the last to the first, so that other threads write than have read.
    e.map([](Num& v) { v = -1e9; },
          View{from.offset + (from.rows - 1) * from.row_stride + (from.cols - 1) * from.col_stride,
               from.rows, from.cols, -from.row_stride, -from.col_stride});
  };
  const Global<const Num> numbers{given.call.rates, 0};
  // Each result is read in another order than it was written in, then written over at once.
  e.load(a, numbers);
  e.map([](Num& out, Num in) { out = in + 1; }, b, reversed);
  e.map([](Num& v) { v = 3; }, a);
  put(0, b);
  e.load(a, numbers);
  e.load(b, numbers);
  e.mm([](Num sum, Num& out) { out = sum; }, square, a, transposed(b));
  e.load(a, {given.call.rates + 1, 0});
  put(50, square);
  e.sum_rows([](Num sum, Num& out) { out = sum; }, row, a);
  e.map([](Num& v) { v = 2; }, a);
  put(100, row);
  e.load(a, numbers);
  e.fold_cols(column, [](Num& sum, Num v) { sum += v; }, 0, a);
  e.map([](Num& v) { v = 2; }, a);
  put(110, column);
  e.load(a, numbers);
  e.fold_rows(row, [](Num& sum, Num v) { sum += v; }, 0, a);
  e.map([](Num& v) { v = 2; }, a);
  put(120, row);
  e.load(a, numbers);
  e.dot(one, a, a);
  e.map([](Num& out, Num v) { out = v; }, column, View{one.offset, kRows, 1, 0, 0});
  put(130, column);
  e.load(a, numbers);
  e.store({given.out, 0}, a);
  e.map([](Num& v) { v = 2; }, reversed);
  e.map([](Num& v) { v = 1; }, weights);
  e.load_labels(labels, weights, {given.call.support_labels.data, 0}, 3, 0);
  e.map([](Num& out, Num v) { out = v; }, column, View{weights.offset + kRows - 1, kRows, 1, -1, 1});
  put(140, labels);
  put(180, column);
}

}  // namespace
}  // namespace fastmeta::cuda

// Fills out [35] and sums [200] from numbers [36] and labels [7].
extern "C" __attribute__((visibility("default"))) void fastmeta_contract(const double* numbers,
                                                                         const int64_t* labels,
                                                                         double* out, double* sums) {
  using namespace fastmeta;
  using namespace fastmeta::cuda;
  Image image{};
  image.layout.size = 400;
  Case given{};
  given.call.image = &image;
  given.call.rates = numbers;
  given.call.partials = sums;
  given.call.support_labels = {labels, 0};
  given.out = out;
  launch(&operate, 1, kThreads, (400 + 8) * sizeof(Num), nullptr, given);
}
