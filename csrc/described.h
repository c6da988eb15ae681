// A network and its options as Python gives them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "expression.h"
#include "network.h"

namespace fastmeta {

using Each = std::array<bool, kTensors>;
// (in, out, activation, option, second option, norm, eps, which tensors it has, which adapt,
// what it reads: from, plus, and whether that is masked)
using LayerTuple = std::tuple<int, int, int, double, double, int, double, Each, Each,
                              std::tuple<int, int, bool>>;

// (kind, option, ignore_index, weighted)
using LossTuple = std::tuple<int, double, int64_t, bool>;
// (kind, momentum, nesterov, decays, decoupled, centered, clips, which two options are learned)
using RuleTuple = std::tuple<int, bool, bool, bool, bool, bool, bool, std::array<bool, 2>>;

inline Loss described(const LossTuple& loss) {
  const auto& [kind, option, ignore_index, weighted] = loss;
  return {LossKind(kind), option, ignore_index, weighted};
}
inline UpdateRule described(const RuleTuple& rule) {
  const auto& [kind, momentum, nesterov, decays, decoupled, centered, clips, learns] = rule;
  return {RuleKind(kind), momentum, nesterov, decays,
          decoupled,      centered, clips,    {learns[0], learns[1]}};
}

// The programs of expressions in a network: of each layer, null where its activation is none, and of
// the losses.
struct Programs {
  std::vector<std::shared_ptr<Program>> layers, short_layers;
  std::shared_ptr<LossPrograms> loss, query_loss;
};

// Steps are of plain SGD, and the query set has the support set's loss, unless said otherwise.
struct InnerLoopTuple {
  RuleTuple rule{};
  bool per_step_support = false;
  std::optional<LossTuple> query_loss;
};

inline Description described(const std::vector<LayerTuple>& layers, const Loss& loss, int support,
                             int query, int steps, bool differentiate, bool first_order,
                             bool elementwise_rates, bool learned_rates, double prox,
                             const InnerLoopTuple& inner) {
  Description network{};
  for (const auto& [in, out, activation, option, second, norm, eps, has, adapts, reads] : layers) {
    Dense layer{in, out, Activation(activation), option, second, Norm(norm), eps, {}, {}};
    std::copy(has.begin(), has.end(), layer.has);
    std::copy(adapts.begin(), adapts.end(), layer.adapts);
    std::tie(layer.from, layer.plus, layer.masked) = reads;
    network.layers.push_back(layer);
  }
  network.loss = loss;
  network.query_loss = inner.query_loss ? described(*inner.query_loss) : loss;
  network.support = support;
  network.query = query;
  network.steps = steps;
  network.differentiate = differentiate;
  network.first_order = first_order;
  network.elementwise_rates = elementwise_rates;
  network.learned_rates = learned_rates;
  network.prox = prox;
  network.rule = described(inner.rule);
  network.per_step_support = inner.per_step_support;
  connect(network);
  return network;
}

// Gives the network its programs, which must outlive it.
inline void give(Description& network, const Programs& programs) {
  for (std::size_t l = 0; l < programs.layers.size(); ++l) {
    network.layers[l].program = programs.layers[l].get();
    network.layers[l].short_program = programs.short_layers[l].get();
  }
  network.loss.programs = programs.loss.get();
  network.query_loss.programs = programs.query_loss.get();
}

// Throws where a rule that has options is given too many or too few.
template <class Network>
const double* checked_options(const Network& network, const std::vector<double>& options) {
  if (is_plain(network.rule)) return nullptr;
  if (options.size() == kRuleOptions) return options.data();
  throw std::invalid_argument("rule_options: " + std::to_string(options.size()) +
                              " values, but a rule has " + std::to_string(kRuleOptions));
}

}  // namespace fastmeta
