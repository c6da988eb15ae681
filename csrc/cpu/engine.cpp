// Which engine takes a step: lanes over tasks, or over features.

#include <stdexcept>

#include "step.h"

namespace fastmeta::cpu {

const Engine& engine(const InstructionSet& set, const std::string& name, const Description& network,
                     int64_t tasks, bool is_double) {
  if (name == "tasks") return set.tasks;
  if (name == "features") return set.features;
  if (!name.empty()) {
    throw std::invalid_argument("FASTMETA_ENGINE: '" + name + "', but it must be tasks or features");
  }
  (void)network, (void)tasks, (void)is_double;
  return set.tasks;
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
  return outer * (n + q) + gram < primal;
}

}  // namespace fastmeta::cpu
