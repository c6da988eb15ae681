// Convolutions in vectors of 16 bytes.

#define FASTMETA_NAMESPACE baseline
#define FASTMETA_BYTES 16
#define FASTMETA_CONV_ROWS 6

#include "unit.h"

namespace fastmeta::conv {

Kernels baseline() {
  using namespace fastmeta::baseline::conv;
  return {kernel<float>(), kernel<double>()};
}

}  // namespace fastmeta::conv
