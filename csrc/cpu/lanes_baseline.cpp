// Lanes in vectors of 16 bytes, which every compiler can lower to what its target has.

#define FASTMETA_NAMESPACE baseline
#define FASTMETA_BYTES 16
#define FASTMETA_TILE_ROWS 3
#define FASTMETA_TILE_COLUMNS 4

#include "lanes.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet baseline() {
  using fastmeta::baseline::Lanes;
  return fastmeta::baseline::instruction_set<Lanes<float>, Lanes<double>>("baseline");
}

}  // namespace fastmeta::cpu
