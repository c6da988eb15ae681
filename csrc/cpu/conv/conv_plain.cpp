// Convolutions number by number: the slow twin of every other unit.

#define FASTMETA_NAMESPACE plain
#define FASTMETA_CONV_ROWS 4

#include "unit.h"

namespace fastmeta::conv {

Kernels plain() {
  using namespace fastmeta::plain::conv;
  return {kernel<float>(), kernel<double>()};
}

}  // namespace fastmeta::conv
