// The plain engine's translation unit.

#define FASTMETA_NAMESPACE plain

#include "plain.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet plain() {
  using fastmeta::plain::Plain;
  return fastmeta::plain::instruction_set<Plain<float>, Plain<double>>("plain");
}

}  // namespace fastmeta::cpu
