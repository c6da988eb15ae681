// A network and its options as Python gives them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "network.h"

namespace fastmeta {

using Each = std::array<bool, kTensors>;
// (in, out, activation, option, second option, norm, eps, which tensors it has, which adapt)
using LayerTuple = std::tuple<int, int, int, double, double, int, double, Each, Each>;

inline Description described(const std::vector<LayerTuple>& layers, const Loss& loss, int support,
                             int query, int steps, bool differentiate, bool first_order,
                             bool elementwise_rates, bool learned_rates, double prox) {
  Description network{};
  for (const auto& [in, out, activation, option, second, norm, eps, has, adapts] : layers) {
    Dense layer{in, out, Activation(activation), option, second, Norm(norm), eps, {}, {}};
    std::copy(has.begin(), has.end(), layer.has);
    std::copy(adapts.begin(), adapts.end(), layer.adapts);
    network.layers.push_back(layer);
  }
  network.loss = loss;
  network.support = support;
  network.query = query;
  network.steps = steps;
  network.differentiate = differentiate;
  network.first_order = first_order;
  network.elementwise_rates = elementwise_rates;
  network.learned_rates = learned_rates;
  network.prox = prox;
  network.body = longest_body(network);
  return network;
}

}  // namespace fastmeta
