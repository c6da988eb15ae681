// A convolutional meta-step, drawn, with random data.
#pragma once

#include <memory>

#include "conv_network.h"
#include "cpu/conv/conv_step.h"

namespace fastmeta::tests {

struct ConvProblem {
  conv::Network network;
  int64_t tasks;
  bool ragged, keep_adapted;
  std::vector<double> step_weights;  // [K + 1]
  std::vector<double> rule_options;  // [kRuleOptions]
  uint64_t seed;
};

// Half of them are plain SGD.
inline void draw_rule(Random& random, conv::Network& network, std::vector<double>& options) {
  options = {0.9, 0, 0.3, 0.8, 0.9, 0.1, 0, 0.5};
  if (random.coin()) return;
  UpdateRule& rule = network.rule;
  rule.kind = random.of<RuleKind>({RuleKind::sgd, RuleKind::adam, RuleKind::rmsprop});
  rule.momentum = rule.kind != RuleKind::adam && random.coin();
  rule.nesterov = rule.kind == RuleKind::sgd && rule.momentum && random.coin();
  rule.decays = random.coin(), rule.decoupled = random.coin();
  rule.centered = rule.kind == RuleKind::rmsprop && random.coin();
  rule.clips = random.coin();
  const bool first = rule.kind == RuleKind::adam || rule.momentum;
  rule.learns[0] = network.differentiate && first && random.coin();
  rule.learns[1] = network.differentiate && rule.kind != RuleKind::sgd && random.coin();
  if (random.coin()) options[kDampening] = rule.nesterov ? 0 : 0.3;
}

inline ConvProblem draw_conv(int number) {
  Random random(number);
  ConvProblem problem{};
  problem.seed = number;
  conv::Network& network = problem.network;
  network.blocks = draw_blocks(random, 1 + number % 3);
  network.loss = {random.coin() ? LossKind::cross_entropy : LossKind::mse, 0, -100, false};
  // Tiles of a direct convolution are as many examples, most often few.
  for (int* examples : {&network.support, &network.query}) {
    *examples = random.of<int>({1, 2, 3, 4, random.of<int>({6, 9, 15})});
  }
  network.steps = number % 4;
  network.differentiate = random.below(4) > 0;
  network.first_order = random.below(3) == 0;
  network.elementwise_rates = random.below(3) == 0;
  network.learned_rates = network.differentiate && random.coin();
  network.prox = random.of<double>({0, 0.4});
  problem.ragged = random.coin();
  problem.keep_adapted = !network.differentiate && random.coin();
  if (problem.keep_adapted) network.query = 0;
  problem.tasks = random.of<int>({1, 3, 18});
  for (int k = 0; k < network.steps; ++k) {
    problem.step_weights.push_back(random.coin() ? random.between(0, 1) : 0);
  }
  problem.step_weights.push_back(1);
  network.query_loss = network.loss;
  if (random.coin()) network.query_loss.kind = LossKind::mse;
  network.per_step_support = random.below(3) == 0;
  draw_rule(random, network, problem.rule_options);
  return problem;
}

// Two maxima, or an activation's corner, that rounding may choose between.
inline bool has_corners(const conv::Network& network) {
  for (const conv::Block& b : network.blocks) {
    if (b.below != 1 || b.window[0] * b.window[1] > 1) return true;
  }
  return false;
}

inline int64_t size_of(const conv::Block& b, int tensor) {
  if (!b.has[tensor]) return 0;
  return tensor == kWeight ? int64_t(b.filters) * b.channels * b.kernel[0] * b.kernel[1] : b.filters;
}

template <class T>
Inputs<T> inputs(const ConvProblem& problem) {
  const conv::Network& network = problem.network;
  Random random(problem.seed);
  const auto numbers = [&](int64_t count, double low, double high) {
    std::vector<T> values(count);
    for (T& value : values) value = T(float(random.between(low, high)));
    return values;
  };
  Inputs<T> in;
  for (const conv::Block& b : network.blocks) {
    const double scale = 1 / std::sqrt(double(size_of(b, kWeight)) / b.filters);
    for (int i = 0; i < kTensors; ++i) {
      const double low = i == kScale ? 0.5 : -scale;
      in.parameters.push_back(numbers(size_of(b, i), low, low + 2 * scale));
    }
    const int given = b.norm == Norm::running ? b.filters : 0;
    in.statistics.push_back(numbers(given, -0.5, 0.5));
    in.statistics.push_back(numbers(given, 0.5, 2));
  }
  for (int k = 0; k < network.steps; ++k) {
    for (const conv::Block& b : network.blocks) {
      for (int i = 0; i < kTensors; ++i) {
        for (T rate : numbers(network.elementwise_rates ? size_of(b, i) : 1, 0.05, 0.3)) {
          in.rates.push_back(b.adapts[i] ? rate : T(0));
        }
      }
    }
  }
  in.task_weights = numbers(problem.tasks, 0, 1);
  const conv::Block& first = network.blocks.front();
  const int64_t image = int64_t(first.channels) * first.height * first.width;
  const int classes = network.blocks.back().filters;
  const auto fill = [&](const Loss& loss, int64_t count, std::vector<T>& x, std::vector<T>& y,
                        std::vector<int64_t>& labels) {
    x = numbers(problem.tasks * count * image, -1, 1);
    if (loss.kind == LossKind::mse) {
      y = numbers(problem.tasks * count * classes, 0, 1);
      return;
    }
    for (int64_t i = 0; i < problem.tasks * count; ++i) labels.push_back(random.below(classes));
  };
  fill(network.loss, network.sets() * network.support, in.support_x, in.support_y,
       in.support_labels);
  fill(network.query_loss, network.query, in.query_x, in.query_y, in.query_labels);
  return in;
}

// What conv::run does, but each task in memory of its own, of exactly its size and full of NaN.
template <class T>
void run_alone(const conv::Kernel<T>& kernel, const conv::Network& network,
               const conv::Layout& layout, conv::Call<T> call,
               const conv::Addresses<T>& addresses) {
  std::vector<T> parameters(conv::packed_size(network, layout));
  conv::pack(network, layout, addresses, parameters.data());
  call.parameters = parameters.data();
  call.rates = network.elementwise_rates ? call.parameters + layout.block + layout.given
                                         : addresses.rates;
  const std::size_t size = conv::sums_size(network, layout);
  std::vector<T> sums(size);
  for (int64_t task = 0; task < call.tasks; ++task) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, layout.size * sizeof(T)) != 0) throw std::bad_alloc();
    std::memset(memory, 0xff, layout.size * sizeof(T));
    std::vector<T> partial(size);
    kernel.run(network, layout, call, task, static_cast<T*>(memory), partial.data());
    for (std::size_t i = 0; i < size; ++i) sums[i] += partial[i];
    if (!addresses.adapted.empty()) {
      const T* const last = static_cast<T*>(memory) + layout.weights;
      conv::unpack_adapted(network, layout, network.steps > 0 ? last : parameters.data(), task,
                           addresses);
    }
    std::free(memory);
  }
  if (network.differentiate) conv::unpack(network, layout, sums.data(), addresses.gradient);
}

// On so many threads, or alone. What nothing writes is not a number.
template <class T>
Results<T> run(const conv::Kernel<T>& kernel, const ConvProblem& problem, const Inputs<T>& in,
               int threads) {
  const conv::Network& network = problem.network;
  const conv::Layout layout = conv::lay_out(network, kernel.lanes);
  const T nothing = T(NAN);
  Results<T> out;
  out.support_losses.assign(network.steps * problem.tasks, nothing);
  out.step_losses.assign((network.steps + 1) * problem.tasks, nothing);
  out.query_outputs.assign(problem.tasks * network.query * network.blocks.back().filters, nothing);
  out.gradient.assign(conv::gradient_size(network), nothing);
  const auto given = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
  conv::Addresses<T> addresses{};
  for (const auto& parameter : in.parameters) addresses.parameters.push_back(given(parameter));
  for (const auto& statistic : in.statistics) addresses.statistics.push_back(given(statistic));
  addresses.rates = given(in.rates);
  addresses.gradient = out.gradient.data();
  if (problem.keep_adapted) {
    out.adapted.resize(in.parameters.size());
    for (std::size_t i = 0; i < in.parameters.size(); ++i) {
      if (network.blocks[i / kTensors].adapts[i % kTensors]) {
        out.adapted[i].assign(problem.tasks * in.parameters[i].size(), nothing);
      }
      addresses.adapted.push_back(out.adapted[i].empty() ? nullptr : out.adapted[i].data());
    }
  }
  std::vector<int64_t> support_counts, query_counts;
  for (int64_t task = 0; problem.ragged && task < problem.tasks; ++task) {
    for (int set = 0; set < network.sets(); ++set) {
      support_counts.push_back(1 + (task + set) % network.support);
    }
    query_counts.push_back(network.query > 0 ? 1 + task / 2 % network.query : 0);
  }
  const std::unique_ptr<bool[]> evaluates(new bool[network.steps + 1]);
  std::fill_n(evaluates.get(), network.steps + 1, network.query > 0);
  conv::Call<T> call{};
  call.tasks = problem.tasks;
  call.support_counts = given(support_counts), call.query_counts = given(query_counts);
  call.rule_options = problem.rule_options.data();
  call.step_weights = problem.step_weights.data();
  call.evaluates = evaluates.get();
  call.task_weights = given(in.task_weights);
  call.support_x = given(in.support_x), call.query_x = given(in.query_x);
  call.support_y = given(in.support_y), call.query_y = given(in.query_y);
  call.support_labels = given(in.support_labels), call.query_labels = given(in.query_labels);
  call.support_losses = out.support_losses.data(), call.step_losses = out.step_losses.data();
  call.query_outputs = out.query_outputs.data();
  if (threads == kAlone) {
    run_alone(kernel, network, layout, call, addresses);
  } else {
    conv::run(kernel, network, layout, call, addresses, threads);
  }
  return out;
}

}  // namespace fastmeta::tests
