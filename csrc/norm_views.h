// A norm's scale and shift beside the matrices [N, H] that they act on.
#pragma once

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// The blocks where a layer's tensors are found.
struct Blocks {
  int64_t of[kTensors];
};

struct NormViews {
  const Dense& layer;
  const LayerPlace& place;
  const int rows;

  FASTMETA_DEVICE View constant(View number) const {
    return {number.offset, rows, layer.out, 0, 0};
  }
  FASTMETA_DEVICE View zero() const { return constant(place.zero); }
  FASTMETA_DEVICE View of(Tensor tensor, int64_t block) const {
    return {block + place.of[tensor], rows, layer.out, 0, 1};
  }
  FASTMETA_DEVICE View scale(int64_t block) const {
    return layer.has[kScale] ? of(kScale, block) : constant(place.one);
  }
  FASTMETA_DEVICE View tangent_scale(int64_t vector) const {
    return layer.has[kScale] ? of(kScale, vector) : zero();
  }
  FASTMETA_DEVICE View shift(int64_t block) const {
    return layer.has[kShift] ? of(kShift, block) : zero();
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
