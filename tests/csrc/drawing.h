// Networks and options of a meta-step, drawn: number by number through every shape and every kind.
#pragma once

#include "problem.h"
#include "programs.h"

namespace fastmeta::tests {

constexpr int kActivations = int(Activation::gelu_tanh) + 1, kLosses = int(LossKind::l1) + 1;

inline bool has_corners(Activation kind) {
  return kind == Activation::relu || kind == Activation::leaky_relu || kind == Activation::elu ||
         kind == Activation::softplus;
}

// In float a rounding error may fall on the other side of a corner, and be none any more.
inline bool has_corners(const Description& network) {
  for (const Dense& layer : network.layers) {
    if (has_corners(layer.activation)) return true;
  }
  const auto has_corner = [](const Loss& loss) {
    return loss.kind >= LossKind::huber && loss.kind != LossKind::expression;
  };
  return has_corner(network.loss) || has_corner(network.query_loss);
}

// Large epsilons, or a second moment near zero would magnify every rounding error.
inline void draw_rule(Random& random, Problem& problem) {
  UpdateRule& rule = problem.network.rule;
  rule.kind = random.of<RuleKind>({RuleKind::sgd, RuleKind::adam, RuleKind::rmsprop});
  rule.momentum = rule.kind != RuleKind::adam && random.coin();
  rule.nesterov = rule.kind == RuleKind::sgd && rule.momentum && random.coin();
  rule.decays = random.coin();
  rule.decoupled = rule.kind == RuleKind::adam && random.coin();
  rule.centered = rule.kind == RuleKind::rmsprop && random.coin();
  rule.clips = random.coin();
  rule.learns[0] = (rule.momentum || rule.kind == RuleKind::adam) && random.coin();
  rule.learns[1] = rule.kind != RuleKind::sgd && random.coin();
  problem.rule_options = {0.7, rule.nesterov ? 0 : 0.2, 0.3, 0.8, 0.7, 0.2,
                          random.of<double>({0, 0.1}), random.of<double>({0.1, 1})};
}

inline Dense dense(Random& random, int in, int out, Activation activation, bool may_take_sets) {
  Dense layer{};
  layer.in = in, layer.out = out, layer.activation = activation;
  if (activation == Activation::leaky_relu) layer.option = 0.2;
  if (activation == Activation::elu) layer.option = random.of<double>({0, 0.7, 1});
  if (activation == Activation::softplus) layer.option = 2, layer.second_option = 1;
  // Large, or a norm over two examples that are nearly alike would magnify every rounding error.
  layer.eps = 0.1;
  if (random.below(3) == 0) {
    layer.norm = may_take_sets ? Norm(random.below(6)) : random.of<Norm>({Norm::layer, Norm::rms});
  }
  layer.has[kWeight] = true;
  layer.has[kBias] = random.below(4) > 0;
  layer.has[kScale] = layer.norm != Norm::none && random.coin();
  layer.has[kShift] = layer.norm != Norm::none && random.coin();
  const bool in_part = random.below(3) == 0;
  for (int tensor = 0; tensor < kTensors; ++tensor) {
    layer.adapts[tensor] = layer.has[tensor] && (!in_part || random.coin());
  }
  return layer;
}

// Appends a layer that reads the last one. Half of the graphs are no chains: a layer may add an earlier
// one of its width, and what it gives may pass through another without a weight.
inline void append(Random& random, Description& network, Dense layer, bool is_chain, bool may_pass) {
  auto& layers = network.layers;
  const auto push = [&](Dense one) {
    one.from = int(layers.size()) - 1;
    for (int at = kData; at < one.from + !one.has[kWeight] && !is_chain; ++at) {
      const int width = at < 0 ? layers.empty() ? one.in : layers[0].in : layers[at].out;
      if (width == one.out && random.coin()) one.plus = at;
    }
    layers.push_back(one);
  };
  push(layer);
  if (is_chain || !may_pass || random.coin()) return;
  Dense passing = dense(random, layer.out, layer.out, layer.activation, false);
  if (passing.activation == Activation::expression) passing.activation = Activation::tanh;
  passing.has[kWeight] = passing.has[kBias] = passing.adapts[kWeight] = passing.adapts[kBias] = false;
  passing.masked = random.coin();
  push(passing);
}

inline Problem draw(int number) {
  static const std::vector<std::vector<int>> widths = {
      {1, 1}, {3, 2}, {1, 7, 1}, {17, 5, 3}, {1, 40, 40, 1}, {4, 6, 5, 3}, {9, 1, 10}, {2, 3, 11, 13, 6, 4}};
  static const std::vector<int> task_counts = {1, 2, 5, 16, 17, 33};
  static const std::vector<int> example_counts = {1, 3, 5, 8, 11};
  Random random(number);
  Problem problem{};
  problem.seed = number;
  problem.ragged = random.coin();
  Description& network = problem.network;
  const std::vector<int>& shape = widths[number % widths.size()];
  const bool is_chain = random.coin();
  for (std::size_t l = 0; l + 1 < shape.size(); ++l) {
    const Activation activation = Activation((number / 3 + l * 3) % kActivations);
    const bool last = l + 2 == shape.size();
    const Dense layer = dense(random, shape[l], shape[l + 1],
                              last && random.below(4) ? Activation::identity : activation,
                              !problem.ragged);
    append(random, network, layer, is_chain, !last);
  }
  // Half of them have a body that is drawn too: by itself few would be more than a layer long.
  const int depth = int(network.layers.size());
  const int frozen = random.coin() ? random.below(depth + 1) : 0;
  for (int l = 0; l < frozen; ++l) std::fill_n(network.layers[l].adapts, int(kTensors), false);
  if (frozen < depth) {
    Dense& moving = network.layers[frozen + random.below(depth - frozen)];
    moving.adapts[kWeight] = moving.has[kWeight];
  }
  connect(network);
  network.body = 0;
  const LossKind loss = LossKind(number % kLosses);
  const double option = loss == LossKind::cross_entropy ? random.of<double>({0, 0.1})
                                                        : random.of<double>({0.3, 1});
  const bool classes = loss == LossKind::cross_entropy;
  const bool weighted = (classes || loss == LossKind::bce_with_logits) && random.coin();
  network.loss = network.query_loss = {loss, option, random.of<int64_t>({-100, 0}), weighted};
  problem.labels = classes && random.below(3) > 0;
  network.steps = number / 5 % 4;
  network.support = random.of(example_counts);
  network.query = random.of(example_counts);
  network.differentiate = random.below(4) > 0;
  network.first_order = random.below(3) == 0;
  network.elementwise_rates = random.below(3) == 0;
  network.learned_rates = network.differentiate && random.coin();
  network.prox = random.of<double>({0, 0.4});
  problem.keep_adapted = !network.differentiate && random.coin();
  if (problem.keep_adapted) network.query = 0;
  problem.tasks = random.of(task_counts);
  for (int k = 0; k <= network.steps; ++k) {
    const bool last = k == network.steps;
    problem.evaluates.push_back(network.query > 0 && (last || random.coin()));
    problem.step_weights.push_back(problem.evaluates[k] ? random.between(0, 1) * !random.below(2) + last
                                                        : 0);
  }
  if (random.coin()) draw_rule(random, problem);
  network.per_step_support = random.below(4) == 0;
  network.inputs_flow = network.differentiate && random.below(3) == 0;
  if (random.below(3) == 0) {
    const LossKind kind =
        random.of<LossKind>({LossKind::cross_entropy, LossKind::bce_with_logits, LossKind::l1});
    network.query_loss = {kind, random.of<double>({0, 0.1}), random.of<int64_t>({-100, 0}),
                          kind != LossKind::l1 && random.coin()};
  }
  if (number % 2 == 1) give_programs(network);
  return problem;
}

inline std::string describe(const Problem& problem) {
  const Description& network = problem.network;
  std::string text = "number " + std::to_string(problem.seed) + ":";
  for (const Dense& layer : network.layers) {
    text += " " + std::to_string(layer.in) + " (" + std::to_string(int(layer.activation));
    text += ", norm " + std::to_string(int(layer.norm)) + ", ";
    for (int tensor = 0; tensor < kTensors; ++tensor) {
      text += !layer.has[tensor] ? '-' : layer.adapts[tensor] ? "WBGS"[tensor] : "wbgs"[tensor];
    }
    text += layer.masked ? ", masked" : "";
    if (layer.plus != kNone) text += ", plus " + std::to_string(layer.plus);
    text += ")";
  }
  text += " " + std::to_string(network.layers.back().out);
  text += ", loss " + std::to_string(int(network.loss.kind));
  if (network.loss.weighted) text += " weighted";
  text += ", T " + std::to_string(problem.tasks) + ", N " + std::to_string(network.support);
  text += ", Q " + std::to_string(network.query) + ", K " + std::to_string(network.steps);
  if (!network.differentiate) text += ", no gradient";
  if (network.first_order) text += ", first order";
  if (network.elementwise_rates) text += ", elementwise";
  if (network.learned_rates) text += ", learned rates";
  if (network.prox != 0) text += ", prox";
  if (network.dual) text += ", dual";
  if (network.inputs_flow) text += ", by inputs";
  if (network.body > 0) text += ", body of " + std::to_string(network.body);
  if (network.reversible) text += ", reversible";
  const UpdateRule& rule = network.rule;
  if (!is_plain(rule)) text += ", rule " + std::to_string(int(rule.kind));
  if (rule.momentum) text += rule.nesterov ? " nesterov" : " momentum";
  if (rule.decays) text += rule.decoupled ? " decoupled decay" : " decay";
  if (rule.centered) text += " centered";
  if (rule.clips) text += " clipped";
  if (rule.learns[0] || rule.learns[1]) text += " learned";
  if (network.per_step_support) text += ", support sets by step";
  if (network.query_loss.kind != network.loss.kind) text += ", another query loss";
  if (problem.ragged) text += ", ragged";
  return text;
}

}  // namespace fastmeta::tests
