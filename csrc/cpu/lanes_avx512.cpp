// Lanes in vectors of 64 bytes: compiled for avx512.

#define FASTMETA_NAMESPACE avx512
#define FASTMETA_BYTES 64
#define FASTMETA_TILE_ROWS 5
#define FASTMETA_TILE_COLUMNS 5

#include "lanes.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet avx512() {
  using fastmeta::avx512::Lanes;
  return fastmeta::avx512::instruction_set<Lanes<float>, Lanes<double>>("avx512");
}

}  // namespace fastmeta::cpu
