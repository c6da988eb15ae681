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

Work work(const Description& network, int width) {
  Work work;
  const auto vectors = [width](int cols) { return (cols + width - 1) / width; };
  const auto add = [&](double times, double rows, double depth, int cols) {
    work.multiplies += times * rows * depth * vectors(cols);
    work.entries += times * rows * vectors(cols);
    work.products += times;
  };
  const auto pass = [&](double times, int examples, bool tangents) {
    for (const Dense& layer : network.layers) {
      // The input of the first layer is data: it has neither derivative nor tangent.
      const bool first = &layer == &network.layers.front();
      const double forward = tangents ? (first ? 2 : 3) : 1;
      const double backward = first ? 0 : tangents ? 3 : 1;
      add(times * forward, examples, layer.in, layer.out);
      add(times * forward, layer.in, examples, layer.out);  // the weight's derivative
      add(times * backward, examples, layer.out, layer.in);
    }
  };
  pass(network.steps, network.support, network.differentiate && !network.first_order);
  pass(1, network.query, false);
  return work;
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

}  // namespace fastmeta::cpu
