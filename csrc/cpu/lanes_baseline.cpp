// Lanes in vectors of 16 bytes, which every compiler can lower to what its target has.

#define FASTMETA_NAMESPACE baseline
#define FASTMETA_BYTES 16
#if defined(__aarch64__)
#define FASTMETA_TILE_ROWS 4
#else
#define FASTMETA_TILE_ROWS 3
#endif
#define FASTMETA_TILE_COLUMNS 4

#include "feature_lanes.h"
#include "lanes.h"
#include "unit.h"

namespace fastmeta::cpu {

InstructionSet baseline() {
  using namespace fastmeta::baseline;
  return {"baseline", engine<Lanes<float>, Lanes<double>>("tasks"),
          engine<FeatureLanes<float>, FeatureLanes<double>>("features")};
}

}  // namespace fastmeta::cpu
