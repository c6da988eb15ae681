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

// use(block, shape, tensor) for every tensor that there is
template <class Use>
void for_tensors(const Network& n, const Layout& layout, Use use) {
  for (std::size_t l = 0; l < n.blocks.size(); ++l) {
    for (int i = 0; i < kTensors; ++i) {
      if (n.blocks[l].has[i]) use(l, n.blocks[l], layout.shapes[l], i);
    }
  }
}

template <class T>
void pack_tensor(const Block& b, const Shape& s, int tensor, const T* from, T* to) {
  to += s.of[tensor];
  if (tensor == kWeight) {
    for_weight(b, s, [=](int64_t theirs, int64_t ours) { to[ours] = from[theirs]; });
  } else {
    std::copy_n(from, b.filters, to);
  }
}

template <class T>
void unpack_tensor(const Block& b, const Shape& s, int tensor, const T* from, T* to) {
  from += s.of[tensor];
  if (tensor == kWeight) {
    for_weight(b, s, [=](int64_t theirs, int64_t ours) { to[theirs] = from[ours]; });
  } else {
    std::copy_n(from, b.filters, to);
  }
}

template <class T>
T* unpack_block(const Network& n, const Layout& layout, const T* from, T* to) {
  for_tensors(n, layout, [&](std::size_t, const Block& b, const Shape& s, int i) {
    unpack_tensor(b, s, i, from, to);
    to += size_of(b, i);
  });
  return to;
}

int64_t parameters_of(const Network& n) {
  int64_t size = 0;
  for (const Block& b : n.blocks) {
    for (int i = 0; i < kTensors; ++i) size += b.has[i] ? size_of(b, i) : 0;
  }
  return size;
}

int64_t tensors_of(const Network& n) { return int64_t(n.blocks.size()) * kTensors; }

int64_t options_of(const Network& n) { return int(n.rule.learns[0]) + int(n.rule.learns[1]); }

}  // namespace

int64_t gradient_size(const Network& n) {
  if (!n.differentiate) return 0;
  const int64_t all = parameters_of(n), rates = n.elementwise_rates ? all : tensors_of(n);
  return all + (n.learned_rates ? n.steps * rates : 0) + options_of(n);
}

int64_t packed_size(const Network& n, const Layout& layout) {
  return layout.block + layout.given + (n.elementwise_rates ? n.steps * layout.block : 0);
}

int64_t sums_size(const Network& n, const Layout& layout) {
  const int64_t rates = n.elementwise_rates ? layout.block : tensors_of(n);
  return layout.block + (n.learned_rates ? n.steps * rates : 0) + options_of(n);
}

template <class T>
void pack(const Network& n, const Layout& layout, const Addresses<T>& from, T* to) {
  std::fill_n(to, packed_size(n, layout), T(0));
  for_tensors(n, layout, [&](std::size_t l, const Block& b, const Shape& s, int i) {
    pack_tensor(b, s, i, from.parameters[l * kTensors + i], to);
  });
  for (std::size_t l = 0; l < n.blocks.size(); ++l) {
    const Block& b = n.blocks[l];
    for (int i = 0; b.norm == Norm::running && i < 2; ++i) {
      const Shape& s = layout.shapes[l];
      std::copy_n(from.statistics[2 * l + i], b.filters, to + s.given + i * s.out);
    }
  }
  const T* rates = from.rates;
  T* place = to + layout.block + layout.given;
  for (int k = 0; n.elementwise_rates && k < n.steps; ++k, place += layout.block) {
    for_tensors(n, layout, [&](std::size_t, const Block& b, const Shape& s, int i) {
      pack_tensor(b, s, i, rates, place);
      rates += size_of(b, i);
    });
  }
}

template <class T>
void unpack(const Network& n, const Layout& layout, const T* from, T* to) {
  const int blocks = 1 + (n.learned_rates && n.elementwise_rates ? n.steps : 0);
  for (int i = 0; i < blocks; ++i, from += layout.block) to = unpack_block(n, layout, from, to);
  const int64_t rates = n.learned_rates && !n.elementwise_rates ? n.steps * tensors_of(n) : 0;
  std::copy_n(from, rates + options_of(n), to);
}

template <class T>
void unpack_adapted(const Network& n, const Layout& layout, const T* from, int64_t task,
                    const Addresses<T>& addresses) {
  for_tensors(n, layout, [&](std::size_t l, const Block& b, const Shape& s, int i) {
    T* const to = addresses.adapted[l * kTensors + i];
    if (to != nullptr) unpack_tensor(b, s, i, from, to + task * size_of(b, i));
  });
}

template void pack(const Network&, const Layout&, const Addresses<float>&, float*);
template void pack(const Network&, const Layout&, const Addresses<double>&, double*);
template void unpack(const Network&, const Layout&, const float*, float*);
template void unpack(const Network&, const Layout&, const double*, double*);
template void unpack_adapted(const Network&, const Layout&, const float*, int64_t,
                             const Addresses<float>&);
template void unpack_adapted(const Network&, const Layout&, const double*, int64_t,
                             const Addresses<double>&);

}  // namespace fastmeta::conv
