// The plain engine's translation unit.

#define FASTMETA_NAMESPACE plain

#include "plain.h"

#include "unit.h"

namespace fastmeta::cpu {

InstructionSet plain() {
  using namespace fastmeta::plain;
  const Engine only = engine<Plain<float>, Plain<double>>("plain");
  return {"plain", only, only};
}

}  // namespace fastmeta::cpu
