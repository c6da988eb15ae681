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

}  // namespace fastmeta::cpu
