// Lanes in vectors of 32 bytes: compiled for avx2.

#define FASTMETA_NAMESPACE avx2
#define FASTMETA_BYTES 32
#define FASTMETA_TILE_ROWS 3
#define FASTMETA_TILE_COLUMNS 4

#include "lanes.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet avx2() {
  using fastmeta::avx2::Lanes;
  return fastmeta::avx2::instruction_set<Lanes<float>, Lanes<double>>("avx2");
}

}  // namespace fastmeta::cpu
