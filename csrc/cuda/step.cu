// The fused meta-step on a GPU: kernels, then launches.

#define FASTMETA_NAMESPACE cuda_block

#include <type_traits>

#include "../scalars.h"
#include "engine.h"
#include "step.h"

#include "../maml.h"

namespace fastmeta::cuda {
namespace {

using namespace cuda_block;

template <class T>
__device__ Data<T, OnDevice> data_of(const Call<T>& call) {
  const Image& image = *call.image;
  const int64_t depth = image.network.layers.count;
  Data<T, OnDevice> data{};
  data.tasks = call.tasks;
  data.parameters = {call.parameters, kTensors * depth};
  data.adapted = {call.adapted, call.keeps_adapted ? kTensors * depth : 0};
  data.statistics = {call.statistics, 2 * depth};
  data.rates = call.rates;
  data.elementwise_rates = {call.rates, 0};
  data.step_weights = {call.step_weights, image.network.steps + 1};
  data.evaluates = image.evaluates;
  data.task_weights = call.task_weights;
  data.rule_options = call.rule_options;
  data.support_x = call.support_x, data.query_x = call.query_x;
  data.support_y = call.support_y, data.query_y = call.query_y;
  data.support_weights = call.support_weights, data.query_weights = call.query_weights;
  data.support_labels = call.support_labels, data.query_labels = call.query_labels;
  data.support_loss_weights = call.support_loss_weights;
  data.query_loss_weights = call.query_loss_weights;
  data.support_losses = call.support_losses, data.step_losses = call.step_losses;
  data.query_outputs = call.query_outputs;
  return data;
}

// A block takes its share of the tasks, one after another, and sums them in a row of its own.
template <class T, class Memory>
__global__ void __launch_bounds__(std::is_same_v<Memory, InShared> ? kThreadsAtOnce : kMostThreads,
                                  1)
run_tasks(const __grid_constant__ Call<T> call) {
  T* const sums = call.partials + block() * call.sums;
  // Long before the first sum: there are barriers in between.
  for (int64_t i = thread(); i < call.sums; i += threads()) sums[i] = 0;
  const Data<T, OnDevice> data = data_of(call);
  const int64_t more = call.blocks_with_one_more;
  const int64_t first = block() * call.tasks_each + (block() < more ? block() : more);
  const int64_t end = first + call.tasks_each + (block() < more ? 1 : 0);
  for (int64_t task = first; task < end; ++task) {
    Block<T, Memory> engine(call, task, sums);
    const Image& image = *call.image;
    run_step(Step<Block<T, Memory>>{engine, image.network, image.layout, data, 0, task > first});
  }
}

template <class T>
struct Partials {
  const T* rows;  // [blocks, sums]
  int64_t blocks, sums;
  T* out;
};

constexpr int kColumns = 32, kSlices = 8;

// Adds up the rows in an order that only their number decides: a slice every eighth, then the slices.
template <class T>
__global__ void __launch_bounds__(kColumns * kSlices)
add_partials(const __grid_constant__ Partials<T> partials) {
  T* const slices = shared<T>();  // [kSlices, kColumns]
  const int column = thread() % kColumns, slice = thread() / kColumns;
  const int64_t at = block() * kColumns + column;
  T sum = 0;
  if (at < partials.sums) {
    for (int64_t row = slice; row < partials.blocks; row += kSlices) {
      sum += partials.rows[row * partials.sums + at];
    }
  }
  slices[thread()] = sum;
  barrier(kSlicesMade);
  if (slice > 0 || at >= partials.sums) return;
  for (int other = 1; other < kSlices; ++other) sum += slices[other * kColumns + column];
  partials.out[at] = sum;
}

}  // namespace

Limits limits(int device) {
  use_device(device);
  check_runs(&run_tasks<float, InShared>);
  return {most_shared_bytes(), multiprocessors()};
}

template <class T>
void run(const Call<T>& call, const Shape& shape, T* gradient, int device, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  use_device(device);
  const bool in_workspace = shape.workspace > 0;
  const Kernel<Call<T>> kernel =
      in_workspace ? &run_tasks<T, InWorkspace> : &run_tasks<T, InShared>;
  allow_shared(kernel, shape.shared_bytes, in_workspace);
  launch(kernel, shape.blocks, shape.threads, shape.shared_bytes, on, call);
  if (call.sums == 0) return;
  const Partials<T> partials{call.partials, shape.blocks, call.sums, gradient};
  launch(&add_partials<T>, (call.sums + kColumns - 1) / kColumns, kColumns * kSlices,
         kColumns * kSlices * sizeof(T), on, partials);
}

template void run(const Call<float>&, const Shape&, float*, int, void*);
template void run(const Call<double>&, const Shape&, double*, int, void*);

}  // namespace fastmeta::cuda
