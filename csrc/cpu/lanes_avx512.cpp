// Lanes in vectors of 64 bytes: compiled for avx512.

#define FASTMETA_NAMESPACE avx512
#define FASTMETA_BYTES 64
#define FASTMETA_TILE_ROWS 5
#define FASTMETA_TILE_COLUMNS 5

#include "feature_lanes.h"
#include "lanes.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet avx512() {
  using namespace fastmeta::avx512;
  return {"avx512", engine<Lanes<float>, Lanes<double>>("tasks"),
          engine<FeatureLanes<float>, FeatureLanes<double>>("features")};
}

}  // namespace fastmeta::cpu
