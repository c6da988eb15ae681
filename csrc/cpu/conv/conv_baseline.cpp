// Convolutions in vectors of 16 bytes.

#define FASTMETA_NAMESPACE baseline
#define FASTMETA_BYTES 16
#if defined(__aarch64__)
#define FASTMETA_CONV_ROWS 10
#else
#define FASTMETA_CONV_ROWS 6
#endif

#include "unit.h"

namespace fastmeta::conv {

Kernels baseline() {
  using namespace fastmeta::baseline::conv;
  return {kernel<float>(), kernel<double>()};
}

}  // namespace fastmeta::conv
