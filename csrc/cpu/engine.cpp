// Which engine takes a step: lanes over tasks, or over features.

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <system_error>

#include "step.h"

namespace fastmeta::cpu {
namespace {

// Of a part of one task's step, in vectors of `width` columns.
struct Work {
  double multiplies = 0;  // multiply-adds of vectors
  double entries = 0;     // vectors of the products' results
  double products = 0;
};

// What a rule of a norm costs, in entries of products.
constexpr double kNorm = 8;

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
  // What one of its rules does beside a product: a norm of examples, a sum.
  void beside(double times, int examples, const Dense& layer) {
    const int vectors = (layer.out + width_ - 1) / width_;
    const bool passes = !layer.has[kWeight] || layer.plus != kNone;
    const double each = (is_of_examples(layer.norm) ? kNorm : 0) + (passes ? 1 : 0);
    work_.entries += each * times * examples * vectors;
  }
  // Its products back to the layer's input.
  void back(double times, int examples, const Dense& layer) {
    add(times, examples, layer.out, layer.in);
  }
  // The dual form's products with the inputs, then those with Gram matrices.
  void dual(const Description& network, double tangents) {
    const Dense& first = network.layers.front();
    const int n = network.support, r = network.all_support(), q = network.query;
    forward(1, r + q, first);
    if (!first.adapts[kWeight]) return;
    add(1, r + q, first.in, r);
    // With a set for each step, a step multiplies with half of R on average: the rows before or after.
    add(network.steps * tangents, n, r > n ? r / 2.0 : n, first.out);
    add(2, q, r, first.out);
  }
  const Work& work() const { return work_; }

 private:
  int width_;
  Work work_;
};

double tangents(const Description& network) {
  return network.differentiate && !network.first_order ? 1 : 0;
}

// The layers that are run once.
Work body(const Description& network, int width) {
  Counter counter(width);
  const int support = network.steps > 0 ? network.support : 0;
  for (int l = 0; l < network.body; ++l) {
    const Dense& layer = network.layers[l];
    if (!layer.has[kWeight]) continue;
    if (l == 0 && network.dual) {
      counter.dual(network, 0);
      continue;
    }
    counter.add(1, support, layer.in, layer.out);
    counter.add(tangents(network), layer.in, support, layer.out);
    counter.forward(1, network.query, layer);
    if (l == 0) continue;  // its input is data
    counter.back(tangents(network), support, layer);
    counter.back(1, network.query, layer);
  }
  return counter.work();
}

// The layers after those.
Work head(const Description& network, int width) {
  Counter counter(width);
  const double tangent = tangents(network);
  for (int l = network.body; l < int(network.layers.size()); ++l) {
    const Dense& layer = network.layers[l];
    counter.beside(network.steps * (2 + 2 * tangent), network.support, layer);
    counter.beside(2, network.query, layer);
    if (!layer.has[kWeight]) continue;
    if (l == 0 && network.dual) {
      counter.dual(network, 1 + tangent);
      continue;
    }
    // The input of the first one has no tangent. Nor has it a derivative where it is data; else
    // only one that the body is given.
    const bool moves = l > network.body;
    counter.forward(network.steps * (1 + (moves ? 2 : 1) * tangent), network.support, layer);
    counter.forward(1, network.query, layer);
    if (l == 0) continue;
    counter.back(network.steps * ((moves ? 1 : 0) + 2 * tangent), network.support, layer);
    counter.back(1, network.query, layer);
  }
  return counter.work();
}

// How many values the largest product of these layers reads and writes.
double largest_product(const Description& network, int from, int to) {
  const double examples = std::max(network.support, network.query);
  double most = 0;
  for (int l = from; l < to; ++l) {
    const Dense& d = network.layers[l];
    if (!d.has[kWeight]) continue;
    most = std::max(most, examples * (d.in + d.out) + double(d.in) * d.out);
  }
  return most;
}

// Bounds of the reversible inner loop, read off `python -m bench.reversible --times`.
constexpr int kFewExamples = 10;
constexpr int64_t kLargestBlock = 2 << 20, kLeastSpared = 6 << 20;

// Of chunks: how many bytes the widest layer's output takes, and how few examples pay. In how many parts
// threads may share those of tasks that are computed together.
constexpr int64_t kChunk = 256 << 10, kFewestRows = 32, kMostParts = 8;

// Estimates in seconds on one core, fitted to `python -m bench.engines` (docs/design.md).
constexpr double kMultiplyAdd = 0.15e-9;

double over_tasks(const Description& network, int64_t tasks, int lanes, int bytes) {
  // A scalar takes a vector here, and products are slower that do not fit the second cache.
  const auto seconds = [&](const Work& one, int from, int to) {
    const double crowded = largest_product(network, from, to) * bytes / 600e3;
    return kMultiplyAdd * 1.45 * (one.multiplies + 5 * one.entries) * std::clamp(crowded, 1.0, 4.0);
  };
  const double groups = double((tasks + lanes - 1) / lanes);
  return groups * (seconds(body(network, 1), 0, network.body) +
                   seconds(head(network, 1), network.body, int(network.layers.size())));
}

double over_features(const Description& network, int64_t tasks, int width) {
  const auto seconds = [](const Work& one) {
    return kMultiplyAdd * (one.multiplies + 17 * one.entries + 800 * one.products);
  };
  return tasks * (seconds(body(network, width)) + seconds(head(network, width)));
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
  const bool frozen = network.body > 0;
  if (!frozen && (network.elementwise_rates || network.prox != 0)) return false;
  if (!frozen && !steps_in_dual_form(network)) return false;
  if (network.per_step_support && network.steps == 0) return false;
  if (network.query == 0 || network.inputs_flow) return false;
  if (!network.layers.front().has[kWeight] || reads_data_again(network)) return false;
  if (!name.empty()) return name == "dual";
  const Dense& first = network.layers.front();
  const double n = network.support, r = network.all_support(), q = network.query, h = first.out;
  // In the body both multiply as much, but one moves the weight for each task, one the products.
  if (frozen) return first.in > n + q;
  const double steps = first.adapts[kWeight] ? network.steps : 0;
  // Products of all examples with a weight, in units of D H.
  const double inner = network.first_order || !network.differentiate ? 2 : 4;
  const double outer = network.differentiate ? 2 : 1;
  const double primal = inner * steps * n + outer * q;
  const double gram = steps > 0 ? r / h * (r + q) : 0;
  const double seen_by_step = r > n ? r / 2 : n;
  const double with_grams = steps > 0 ? steps * inner / 2 * n * seen_by_step + outer * q * r : 0;
  return outer * (r + q) + gram + with_grams / first.in < primal;
}

void cut(const std::string& chunk, const std::string& form, Description& network, int64_t groups,
         int bytes, int64_t storage) {
  int64_t rows = 0;
  const char* const end = chunk.data() + chunk.size();
  const auto parsed = std::from_chars(chunk.data(), end, rows);
  if (!chunk.empty() && (parsed.ec != std::errc() || parsed.ptr != end || rows < 0)) {
    throw std::invalid_argument("FASTMETA_CHUNK: '" + chunk +
                                "', but it must be a number of examples or unset");
  }
  const bool is_alone = groups == 1;
  const bool computes_more = network.dual || network.body > 0;
  const int64_t most = computes_more ? kHuge : is_alone ? 0 : kLarge;
  if (chunk.empty() ? storage * bytes <= most : rows == 0) return;
  if (network.dual && form == "dual") return;
  int widest = 0;
  for (const Dense& layer : network.layers) {
    if (layer.norm == Norm::batch) return;  // of all examples together
    widest = std::max({widest, layer.in, layer.out});
  }
  const int64_t longest = std::max(network.support, network.query);
  if (chunk.empty()) {
    // Every part has storage of its own.
    const int64_t each = (is_alone ? kChunk / 2 : kChunk) / (int64_t(widest) * bytes);
    rows = std::max<int64_t>(each / 8 * 8, kFewestRows);
    if (longest < 2 * rows) return;
  }
  if (longest <= rows) return;
  // Chunks of one size, as far as they can be.
  const int64_t chunks = (longest + rows - 1) / rows;
  network.chunk = int((longest + chunks - 1) / chunks);
  network.parts = is_alone ? int(std::min(kMostParts, chunks)) : 1;
  network.dual = false, network.together = 1, network.body = 0;
}

bool reversible(const std::string& name, const Description& network, int64_t block_bytes) {
  if (name != "" && name != "saved" && name != "reversible") {
    throw std::invalid_argument("FASTMETA_MEMORY: '" + name +
                                "', but it must be saved or reversible");
  }
  if (!sweeps(network) || network.steps < 2 || !steps_plainly(network)) return false;
  if (!name.empty()) return name == "reversible";
  // Faster where few examples make products cheap, and all blocks would leave the caches but two
  // do not.
  return network.support <= kFewExamples && !network.elementwise_rates && network.prox == 0 &&
         block_bytes <= kLargestBlock && (network.steps - 1) * block_bytes >= kLeastSpared;
}

int together(const Description& network, int64_t tasks) {
  const int rows = network.all_support() + network.query;
  const int64_t most = std::max<int64_t>(1, tasks / 8);
  return int(std::clamp<int64_t>(64 / rows, 1, most));
}

}  // namespace fastmeta::cpu
