// Between torch's tensors and blocks of parameters.

#include "packing.h"

#include <algorithm>
#include <cstdint>

namespace fastmeta::conv {
namespace {

int64_t size_of(const Block& b, int tensor) {
  return tensor == kWeight
             ? int64_t(b.filters) * b.channels * b.kernel[0] * b.kernel[1]
             : b.filters;
}

// use(torch's place [filters, channels, taps], ours [taps, in, out]) for every number of a weight.
template <class Use>
void for_weight(const Block& b, const Shape& s, Use use) {
  const int taps = b.kernel[0] * b.kernel[1];
  int64_t at = 0;
  for (int f = 0; f < b.filters; ++f) {
    for (int c = 0; c < b.channels; ++c) {
      for (int t = 0; t < taps; ++t, ++at) use(at, (int64_t(t) * s.in + c) * s.out + f);
    }
  }
}

}  // namespace

int64_t gradient_size(const Network& n) {
  if (!n.differentiate) return 0;
  int64_t size = n.learned_rates ? int64_t(n.steps) * n.blocks.size() * kTensors : 0;
  for (const Block& b : n.blocks) {
    for (int i = 0; i < kTensors; ++i) size += b.has[i] ? size_of(b, i) : 0;
  }
  return size;
}

template <class T>
void pack(const Network& n, const Layout& layout, const Addresses<T>& from, T* to) {
  std::fill_n(to, layout.block + layout.given, T(0));
  for (std::size_t l = 0; l < n.blocks.size(); ++l) {
    const Block& b = n.blocks[l];
    const Shape& s = layout.shapes[l];
    for (int i = 0; i < kTensors; ++i) {
      const T* const tensor = from.parameters[l * kTensors + i];
      if (!b.has[i]) continue;
      if (i == kWeight) {
        for_weight(b, s, [&](int64_t theirs, int64_t ours) { to[s.of[i] + ours] = tensor[theirs]; });
      } else {
        std::copy_n(tensor, b.filters, to + s.of[i]);
      }
    }
    for (int i = 0; b.norm == Norm::running && i < 2; ++i) {
      std::copy_n(from.statistics[2 * l + i], b.filters, to + s.given + i * s.out);
    }
  }
}

template <class T>
void unpack(const Network& n, const Layout& layout, const T* from, T* to) {
  for (std::size_t l = 0; l < n.blocks.size(); ++l) {
    const Block& b = n.blocks[l];
    const Shape& s = layout.shapes[l];
    for (int i = 0; i < kTensors; ++i) {
      if (!b.has[i]) continue;
      if (i == kWeight) {
        for_weight(b, s, [&](int64_t theirs, int64_t ours) { to[theirs] = from[s.of[i] + ours]; });
      } else {
        std::copy_n(from + s.of[i], b.filters, to);
      }
      to += size_of(b, i);
    }
  }
  if (n.learned_rates) {
    std::copy_n(from + layout.block, n.steps * n.blocks.size() * kTensors, to);
  }
}

template void pack(const Network&, const Layout&, const Addresses<float>&, float*);
template void pack(const Network&, const Layout&, const Addresses<double>&, double*);
template void unpack(const Network&, const Layout&, const float*, float*);
template void unpack(const Network&, const Layout&, const double*, double*);

}  // namespace fastmeta::conv
