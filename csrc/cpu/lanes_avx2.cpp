// Lanes in vectors of 32 bytes: compiled for avx2.

#define FASTMETA_NAMESPACE avx2
#define FASTMETA_BYTES 32
#define FASTMETA_TILE_ROWS 3
#define FASTMETA_TILE_COLUMNS 4

#include "feature_lanes.h"
#include "lanes.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet avx2() {
  using namespace fastmeta::avx2;
  return {"avx2", engine<Lanes<float>, Lanes<double>>("tasks"),
          engine<FeatureLanes<float>, FeatureLanes<double>>("features")};
}

}  // namespace fastmeta::cpu
