// The parameters of a block, and where it keeps what.
#pragma once

#include "layout.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::Kept;
using fastmeta::conv::Layout;
using fastmeta::conv::Moving;
using fastmeta::conv::Network;
using fastmeta::conv::Shape;

// Where a block's tensors lie. Null where it has no bias; ones and zeros for a norm's own.
template <class T>
struct Tensors {
  const T* of[kTensors];
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
