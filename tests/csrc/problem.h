// A meta-step with random data, for programs that know neither torch nor Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cpu/masses.h"
#include "cpu/step.h"
#include "network.h"

namespace fastmeta::tests {

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  double between(double low, double high) {
    return low + (high - low) * double(bits_() >> 11) * 0x1p-53;
  }
  int below(int count) { return int(bits_() % uint64_t(count)); }
  bool coin() { return below(2) == 1; }
  template <class T>
  T of(const std::vector<T>& choices) {
    return choices[below(int(choices.size()))];
  }

 private:
  std::mt19937_64 bits_;
};

// What a step is made of; the numbers themselves follow from the seed.
struct Problem {
  Description network;
  int64_t tasks;
  bool labels, ragged, keep_adapted;
  std::vector<double> step_weights;  // [K + 1]
  std::vector<double> rule_options;  // [kRuleOptions]
  std::vector<char> evaluates;       // [K + 1]
  uint64_t seed;
};

// Every array has its own memory of exactly its size, so that a step past its end is seen.
template <class T>
struct Inputs {
  std::vector<std::vector<T>> parameters, statistics, support_masks, query_masks;
  std::vector<T> rates, task_weights;
  std::vector<T> support_x, query_x, support_y, query_y, support_weights, query_weights;
  std::vector<T> support_loss_weights, query_loss_weights, scale;
  std::vector<int64_t> support_labels, query_labels;
};

template <class T>
struct Results {
  std::vector<T> support_losses, step_losses, query_outputs, gradient, of_support, of_query;
  std::vector<std::vector<T>> adapted;
};

inline int64_t size_of(const Dense& layer, int tensor) {
  if (!layer.has[tensor]) return 0;
  return tensor == kWeight ? int64_t(layer.in) * layer.out : layer.out;
}

template <class T>
Inputs<T> inputs(const Problem& problem) {
  const Description& network = problem.network;
  Random random(problem.seed);
  // The same numbers in float as in double.
  const auto numbers = [&](int64_t count, double low, double high) {
    std::vector<T> values(count);
    for (T& value : values) value = T(float(random.between(low, high)));
    return values;
  };
  Inputs<T> in;
  for (const Dense& layer : network.layers) {
    const double scale = 1 / std::sqrt(double(layer.in));
    for (int tensor = 0; tensor < kTensors; ++tensor) {
      const double low = tensor == kScale ? 0.5 : -scale;
      in.parameters.push_back(numbers(size_of(layer, tensor), low, low + 2 * scale));
    }
    const int64_t given = layer.norm == Norm::running ? layer.out : 0;
    in.statistics.push_back(numbers(given, -0.5, 0.5));
    in.statistics.push_back(numbers(given, 0.5, 2));
  }
  for (int k = 0; k < network.steps; ++k) {
    for (const Dense& layer : network.layers) {
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        const int64_t count = network.elementwise_rates ? size_of(layer, tensor) : 1;
        for (T rate : numbers(count, 0.05, 0.3)) {
          in.rates.push_back(layer.adapts[tensor] ? rate : T(0));
        }
      }
    }
  }
  in.task_weights = numbers(problem.tasks, 0, 1);
  const int d = network.layers.front().in, c = network.layers.back().out;
  const int sets = network.per_step_support ? network.steps : 1;
  const auto fill = [&](const Loss& loss, int64_t tasks, int count, std::vector<T>& x,
                        std::vector<T>& y, std::vector<int64_t>& labels, std::vector<T>& weights,
                        std::vector<T>& loss_weights) {
    const int64_t examples = tasks * count;
    const bool classes = loss.kind == LossKind::cross_entropy;
    x = numbers(examples * d, -1, 1);
    if (problem.labels && classes) {
      for (int64_t i = 0; i < examples; ++i) {
        labels.push_back(random.below(5) == 0 ? loss.ignore_index : random.below(c));
      }
    } else {
      y = numbers(examples * c, 0, 1);
    }
    if (loss.weighted) loss_weights = numbers(classes ? c : examples * c, 0.5, 2);
    for (int64_t t = 0; problem.ragged && count > 0 && t < tasks; ++t) {
      const int real = 1 + random.below(count);
      for (int i = 0; i < count; ++i) weights.push_back(i < real ? T(1) / T(real) : T(0));
    }
  };
  fill(network.loss, problem.tasks * sets, network.support, in.support_x, in.support_y, in.support_labels, in.support_weights,
       in.support_loss_weights);
  fill(network.query_loss, problem.tasks, network.query, in.query_x, in.query_y, in.query_labels, in.query_weights,
       in.query_loss_weights);
  in.scale = numbers(c, 0.5, 2);
  const int asked = int(std::count(problem.evaluates.begin(), problem.evaluates.end(), 1));
  for (const Dense& layer : network.layers) {
    const auto masks = [&](int64_t passes, int count) {
      std::vector<T> values = numbers(layer.masked ? problem.tasks * passes * count * layer.out : 0, -1, 1);
      for (T& value : values) value = value < 0 ? T(0) : T(1.5);
      return values;
    };
    in.support_masks.push_back(masks(network.steps, network.support));
    in.query_masks.push_back(masks(asked, network.query));
  }
  return in;
}

inline const cpu::Kernel<float>& kernel(const cpu::Engine& engine, float) {
  return engine.of_float;
}
inline const cpu::Kernel<double>& kernel(const cpu::Engine& engine, double) {
  return engine.of_double;
}

// What cpu::run does for few tasks, but each group in memory of its own, of exactly its size and
// full of NaN.
template <class T>
void run_alone(const cpu::Kernel<T>& kernel, const Description& network, const Layout& layout,
               const Data<T>& data) {
  const std::size_t sums = network.differentiate ? gradient_size(network, layout) : 0;
  const std::size_t bytes = layout.size * kernel.tasks * sizeof(T), alignment = 64;
  std::vector<T> total(sums);
  const int64_t group = kernel.tasks * (network.dual ? network.together : 1);
  for (int64_t first = 0; first < data.tasks; first += group) {
    void *storage = nullptr, *memory = nullptr;
    if (posix_memalign(&storage, alignment, bytes) != 0) throw std::bad_alloc();
    if (posix_memalign(&memory, alignment, (sums + 1) * sizeof(T)) != 0) throw std::bad_alloc();
    std::memset(storage, 0xff, bytes);
    T* const partial = static_cast<T*>(memory);
    std::fill_n(partial, sums, T(0));
    const int64_t last = std::min<int64_t>(first + group, data.tasks);
    kernel.run(network, layout, data, first, last, false, storage, partial);
    for (std::size_t i = 0; i < sums; ++i) total[i] += partial[i];
    std::free(storage);
    std::free(memory);
  }
  if (sums > 0) kernel.unpack(network, layout, total.data(), data.gradient);
}

constexpr int kAlone = 0;

// On so many threads, or alone. What nothing writes is not a number.
template <class T>
Results<T> run(const cpu::Engine& engine, const Problem& problem, const Inputs<T>& in,
               int threads) {
  const Description& network = problem.network;
  const cpu::Kernel<T>& chosen = kernel(engine, T());
  const Layout layout = lay_out(network, chosen.width);
  const int64_t d = network.layers.front().in, c = network.layers.back().out;
  const int64_t n = network.all_support();
  const int64_t q = network.query;
  const T nothing = T(NAN);
  Results<T> out;
  out.support_losses.assign(network.steps * problem.tasks, nothing);
  out.step_losses.assign((network.steps + 1) * problem.tasks, nothing);
  out.query_outputs.assign(problem.tasks * q * c, nothing);
  // Inputs of the support set have none of first order.
  if (network.inputs_flow) out.of_support.assign(problem.tasks * n * d, T(0));
  // Chunks add to what is there.
  const T start = network.chunk > 0 ? T(0) : nothing;
  if (network.inputs_flow) out.of_query.assign(problem.tasks * q * d, start);
  out.gradient.assign(network.differentiate ? gradient_size(network, layout) : 0, nothing);

  const auto given = [](const auto& values) {
    return values.empty() ? nullptr : values.data();
  };
  Data<T> data{};
  data.tasks = problem.tasks;
  for (const auto& parameter : in.parameters) data.parameters.push_back({given(parameter), 0});
  for (const auto& statistic : in.statistics) data.statistics.push_back({given(statistic), 0});
  if (problem.keep_adapted) {
    out.adapted.resize(in.parameters.size());
    for (std::size_t i = 0; i < in.parameters.size(); ++i) {
      const int64_t size = in.parameters[i].size();
      if (network.layers[i / kTensors].adapts[i % kTensors]) {
        out.adapted[i].assign(problem.tasks * size, nothing);
      }
      data.adapted.push_back({out.adapted[i].empty() ? nullptr : out.adapted[i].data(), size});
    }
  }
  data.rates = given(in.rates);
  data.elementwise_rates = {given(in.rates), 0};
  data.step_weights.assign(problem.step_weights.begin(), problem.step_weights.end());
  data.evaluates = problem.evaluates;
  data.task_weights = given(in.task_weights);
  const std::vector<double> none(kRuleOptions);
  data.rule_options = problem.rule_options.empty() ? none.data() : problem.rule_options.data();
  data.support_x = {given(in.support_x), n * d};
  data.support_y = {given(in.support_y), n * c};
  data.support_labels = {given(in.support_labels), n};
  data.support_weights = {given(in.support_weights), n};
  data.query_x = {given(in.query_x), q * d};
  data.query_y = {given(in.query_y), q * c};
  data.query_labels = {given(in.query_labels), q};
  data.query_weights = {given(in.query_weights), q};
  const auto of_classes = [](const Loss& loss) { return loss.kind == LossKind::cross_entropy; };
  data.support_loss_weights = {given(in.support_loss_weights), of_classes(network.loss) ? 0 : n * c};
  data.query_loss_weights = {given(in.query_loss_weights),
                             of_classes(network.query_loss) ? 0 : q * c};
  if (network.loss.programs) {
    data.support_loss_inputs = {{given(in.support_y), n * c}, {given(in.scale), 0}};
  }
  if (network.query_loss.programs) {
    data.query_loss_inputs = {{given(in.query_y), q * c}, {given(in.scale), 0}};
  }
  for (std::size_t l = 0; l < in.support_masks.size(); ++l) {
    for (auto* masks : {&in.support_masks[l], &in.query_masks[l]}) {
      auto& to = masks == &in.support_masks[l] ? data.support_masks : data.query_masks;
      to.push_back({given(*masks), int64_t(masks->size()) / problem.tasks});
    }
  }
  std::vector<T> tails[2];
  for (int set = 0; set < 2; ++set) {
    const int count = set == 0 ? network.support : network.query;
    tails[set].assign(network.rows(count), T(1));
    std::fill_n(tails[set].begin(), network.rows(count) * network.chunks(count) - count, T(0));
  }
  data.support_tail = tails[0].data(), data.query_tail = tails[1].data();
  std::vector<T> masses[2];
  if (network.chunk > 0) {
    const int sets = network.per_step_support ? network.steps : 1;
    masses[0] = cpu::masses<T>(network.loss, given(in.support_labels), given(in.support_weights),
                               given(in.support_loss_weights), problem.tasks * sets, network.support);
    masses[1] = cpu::masses<T>(network.query_loss, given(in.query_labels), given(in.query_weights),
                               given(in.query_loss_weights), problem.tasks, network.query);
    data.support_mass = {given(masses[0]), sets}, data.query_mass = {given(masses[1]), 1};
  }
  data.support_losses = {out.support_losses.data(), 1};
  data.step_losses = {out.step_losses.data(), 1};
  data.query_outputs = {out.query_outputs.data(), q * c};
  data.gradient = out.gradient.data();
  data.of_support = {out.of_support.data(), n * d}, data.of_query = {out.of_query.data(), q * d};
  if (threads == kAlone) {
    run_alone(chosen, network, layout, data);
  } else {
    cpu::run(chosen, network, layout, data, threads);
  }
  return out;
}

template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}
template <class T>
Results<double> widened(const Results<T>& from) {
  Results<double> to{widened(from.support_losses), widened(from.step_losses),
                     widened(from.query_outputs), widened(from.gradient), widened(from.of_support),
                     widened(from.of_query), {}};
  for (const auto& values : from.adapted) to.adapted.push_back(widened(values));
  return to;
}

// |a - b| over 1 + |b|; a number on one side alone is infinitely far.
template <class T>
double distance(const std::vector<T>& a, const std::vector<T>& b) {
  double apart = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return INFINITY;
    if (std::isnan(a[i])) continue;
    apart += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
    size += double(b[i]) * double(b[i]);
  }
  return std::sqrt(apart) / (1 + std::sqrt(size));
}

template <class T>
double distance(const Results<T>& a, const Results<T>& b) {
  double most = std::max({distance(a.support_losses, b.support_losses),
                          distance(a.step_losses, b.step_losses),
                          distance(a.query_outputs, b.query_outputs),
                          distance(a.gradient, b.gradient), distance(a.of_support, b.of_support),
                          distance(a.of_query, b.of_query)});
  for (std::size_t i = 0; i < a.adapted.size(); ++i) {
    most = std::max(most, distance(a.adapted[i], b.adapted[i]));
  }
  return most;
}

// Bit by bit.
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
bool same(const Results<T>& a, const Results<T>& b) {
  for (std::size_t i = 0; i < a.adapted.size(); ++i) {
    if (!same(a.adapted[i], b.adapted[i])) return false;
  }
  return same(a.support_losses, b.support_losses) && same(a.step_losses, b.step_losses) &&
         same(a.query_outputs, b.query_outputs) && same(a.gradient, b.gradient) &&
         same(a.of_support, b.of_support) && same(a.of_query, b.of_query);
}

}  // namespace fastmeta::tests
