// What a kernel is given: a network and its layout in device memory, and the addresses of one call.
#pragma once

#include "../network.h"

namespace fastmeta::cuda {

// What lies in memory that belongs to someone else.
template <class T>
struct Sequence {
  const T* data;
  int64_t count;
  FASTMETA_DEVICE const T& operator[](int64_t i) const { return data[i]; }
  FASTMETA_DEVICE const T& front() const { return data[0]; }
  FASTMETA_DEVICE const T* begin() const { return data; }
  FASTMETA_DEVICE const T* end() const { return data + count; }
  FASTMETA_DEVICE int64_t size() const { return count; }
  FASTMETA_DEVICE bool empty() const { return count == 0; }
};

struct OnDevice {
  template <class T>
  using List = Sequence<T>;
};

// A call's addresses travel with the launch, in the 4 KB that every architecture gives them.
constexpr int kMostLayers = 16;

constexpr int kMostThreads = 256;
// Threads of a multiprocessor whose tasks lie in shared memory: 168 of its 65,536 registers for each.
constexpr int kThreadsAtOnce = 384;
// Numbers of shared memory that the engine takes for itself: one for each warp.
constexpr int kScratch = kMostThreads / 32;

// The head of the memory that is written once a kernel and device; what its lists hold follows.
struct Image {
  DescriptionIn<OnDevice> network;
  LayoutIn<OnDevice> layout;
  Sequence<char> evaluates;
};

// The first layer's products with the inputs in dual form, made by others: X W_0', X X', X_q X';
// and the cotangents C that they make the gradient of. Each [T, ...]; null in primal form.
template <class T>
struct Products {
  Global<const T> support, query, gram, cross;
  Global<T> of_support, of_query;
};

template <class T>
struct Call {
  const Image* image;
  int64_t tasks;
  int64_t tasks_each, blocks_with_one_more;  // how many a block takes; the first so many take one more
  Global<const T> parameters[kTensors * kMostLayers];
  Global<const T> statistics[2 * kMostLayers];
  Global<T> adapted[kTensors * kMostLayers];
  bool keeps_adapted;
  bool tf32;  // whether products round their operands to TF32; doubles never do
  const T *rates, *step_weights, *task_weights;
  const double* rule_options;  // [kRuleOptions]
  Global<const T> support_x, query_x, support_y, query_y, support_weights, query_weights;
  Global<const T> support_loss_weights, query_loss_weights;
  Global<const int64_t> support_labels, query_labels;
  Products<T> products;
  Global<T> support_losses, step_losses, query_outputs;
  T* workspace;  // of each block, where shared memory can't hold it: [blocks, elements of the layout]
  T* partials;   // [blocks, sums]
  int64_t sums;  // how many elements are summed over tasks
};

}  // namespace fastmeta::cuda
