// Convolutions in vectors of 64 bytes.

#define FASTMETA_NAMESPACE avx512
#define FASTMETA_BYTES 64
#define FASTMETA_CONV_ROWS 14

#include "unit.h"

namespace fastmeta::conv {

Kernels avx512() {
  using namespace fastmeta::avx512::conv;
  return {kernel<float>(), kernel<double>()};
}

}  // namespace fastmeta::conv
