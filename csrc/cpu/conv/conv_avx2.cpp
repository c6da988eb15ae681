// Convolutions in vectors of 32 bytes.

#define FASTMETA_NAMESPACE avx2
#define FASTMETA_BYTES 32
#define FASTMETA_CONV_ROWS 6

#include "unit.h"

namespace fastmeta::conv {

Kernels avx2() {
  using namespace fastmeta::avx2::conv;
  return {kernel<float>(), kernel<double>()};
}

}  // namespace fastmeta::conv
