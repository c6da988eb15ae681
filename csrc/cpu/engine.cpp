// Which engine takes a step: lanes over tasks, or over features.

#include <algorithm>
#include <stdexcept>

#include "step.h"

namespace fastmeta::cpu {
namespace {

// Of the step of one task, in vectors of `width` columns.
struct Work {
  double multiplies = 0;  // multiply-adds of vectors
  double entries = 0;     // vectors of the products' results
  double products = 0;
};

class Counter {
 public:
  explicit Counter(int width) : width_(width) {}

  void add(double times, double rows, double depth, int cols) {
    const int vectors = (cols + width_ - 1) / width_;
    work_.multiplies += times * rows * depth * vectors;
    work_.entries += times * rows * vectors;
    work_.products += times;
  }
  // A layer's products with its weight in so many passes forward, and as many derivatives of that.
  void forward(double times, int examples, const Dense& layer) {
    add(times, examples, layer.in, layer.out);
    add(times, layer.in, examples, layer.out);
  }
  // The dual form's products with the inputs, then those with Gram matrices.
  void dual(const Description& network, double tangents) {
    const Dense& first = network.layers.front();
    const int n = network.support, q = network.query;
    forward(1, n + q, first);
    if (!first.adapts[kWeight]) return;
    add(1, n + q, first.in, n);
    add(network.steps * tangents, n, n, first.out);
    add(2, q, n, first.out);
  }
  const Work& work() const { return work_; }

 private:
  int width_;
  Work work_;
};

Work work(const Description& network, int width) {
  Counter counter(width);
  const double tangents = network.differentiate && !network.first_order ? 1 : 0;
  if (network.dual) counter.dual(network, 1 + tangents);
  for (const Dense& layer : network.layers) {
    // The input of the first layer is data: it has neither derivative nor tangent.
    if (&layer == &network.layers.front()) {
      if (network.dual) continue;
      counter.forward(network.steps * (1 + tangents), network.support, layer);
      counter.forward(1, network.query, layer);
      continue;
    }
    counter.forward(network.steps * (1 + 2 * tangents), network.support, layer);
    counter.forward(1, network.query, layer);
    counter.add(network.steps * (1 + 2 * tangents), network.support, layer.out, layer.in);
    counter.add(1, network.query, layer.out, layer.in);
  }
  return counter.work();
}

// The numbers that the largest product reads and writes.
double largest_product(const Description& network) {
  const double examples = std::max(network.support, network.query);
  double most = 0;
  for (const Dense& d : network.layers) {
    most = std::max(most, examples * (d.in + d.out) + double(d.in) * d.out);
  }
  return most;
}

// Bounds of the reversible inner loop, read off `python -m bench.reversible --times`.
constexpr int kFewExamples = 16;
constexpr int64_t kLargestBlock = 2 << 20, kLeastSpared = 6 << 20;

// Estimates in seconds on one core, fitted to `python -m bench.engines` (docs/design.md).
constexpr double kMultiplyAdd = 0.15e-9;

double over_tasks(const Description& network, int64_t tasks, int lanes, int bytes) {
  const Work one = work(network, 1);
  // A number takes a vector here, and products are slower that do not fit the second cache.
  const double crowded = largest_product(network) * bytes / 600e3;
  const double groups = double((tasks + lanes - 1) / lanes);
  return kMultiplyAdd * groups * 1.45 * (one.multiplies + 5 * one.entries) *
         std::clamp(crowded, 1.0, 4.0);
}

double over_features(const Description& network, int64_t tasks, int width) {
  const Work one = work(network, width);
  return kMultiplyAdd * tasks * (one.multiplies + 17 * one.entries + 600 * one.products);
}

template <class T>
Chosen choose(const Engine& tasks, const Engine& features, Kernel<T> Engine::* of,
              const std::string& name, const Description& network, int64_t count) {
  const int lanes = (tasks.*of).tasks, width = (features.*of).width;
  const Chosen first{tasks, over_tasks(network, count, lanes, lanes * int(sizeof(T)))};
  const Chosen second{features, over_features(network, count, width)};
  if (name == "tasks") return first;
  if (name == "features") return second;
  if (!name.empty()) {
    throw std::invalid_argument("FASTMETA_ENGINE: '" + name +
                                "', but it must be tasks, features or unset");
  }
  return second.seconds < first.seconds ? second : first;
}

}  // namespace

Chosen choose_engine(const InstructionSet& set, const std::string& name, const Description& network,
                     int64_t tasks, bool is_double) {
  return is_double ? choose(set.tasks, set.features, &Engine::of_double, name, network, tasks)
                   : choose(set.tasks, set.features, &Engine::of_float, name, network, tasks);
}

bool dual(const std::string& name, const Description& network) {
  if (name != "" && name != "dual" && name != "primal") {
    throw std::invalid_argument("FASTMETA_FORM: '" + name + "', but it must be primal or dual");
  }
  // Weights of their own for each element, an anchor, or adapted ones that are asked for.
  if (network.elementwise_rates || network.prox != 0 || network.query == 0) return false;
  if (!name.empty()) return name == "dual";
  const Dense& first = network.layers.front();
  const double n = network.support, q = network.query, h = first.out;
  const double steps = first.adapts[kWeight] ? network.steps : 0;
  // Products of all examples with a weight, in units of D H.
  const double inner = network.first_order || !network.differentiate ? 2 : 4;
  const double outer = network.differentiate ? 2 : 1;
  const double primal = inner * steps * n + outer * q;
  const double gram = steps > 0 ? n / h * (n + q) : 0;
  const double with_grams = steps > 0 ? n / first.in * (steps * inner / 2 * n + outer * q) : 0;
  return outer * (n + q) + gram + with_grams < primal;
}

bool reversible(const std::string& name, const Description& network, int64_t block_bytes) {
  if (name != "" && name != "saved" && name != "reversible") {
    throw std::invalid_argument("FASTMETA_MEMORY: '" + name +
                                "', but it must be saved or reversible");
  }
  if (!sweeps(network) || network.steps < 2) return false;
  if (!name.empty()) return name == "reversible";
  // Faster where few examples make products cheap, and all blocks would leave the caches but two
  // do not.
  return network.support <= kFewExamples && !network.elementwise_rates && network.prox == 0 &&
         block_bytes <= kLargestBlock && (network.steps - 1) * block_bytes >= kLeastSpared;
}

int together(const Description& network, int64_t tasks) {
  const int rows = network.support + network.query;
  const int64_t most = std::max<int64_t>(1, tasks / 8);
  return int(std::clamp<int64_t>(64 / rows, 1, most));
}

}  // namespace fastmeta::cpu
