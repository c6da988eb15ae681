// The convolutional meta-step on this processor: tasks spread over threads.

#include "conv_step.h"

#include <algorithm>
#include <cstdint>

#include "../arena.h"
#include "../pool.h"

namespace fastmeta::conv {
namespace {

using cpu::Arena;

constexpr int64_t kMostGroups = 16;
constexpr int64_t kSlice = 1 << 14;  // of the sums that one thread adds up

thread_local Arena arena, arena_of_call;

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

}  // namespace

Kernels kernels(const std::string& instruction_set) {
#if defined(FASTMETA_X86)
  if (instruction_set == "avx512") return avx512();
  if (instruction_set == "avx2") return avx2();
#endif
  return instruction_set == "plain" ? plain() : baseline();
}

int64_t gradient_size(const Network& n) {
  if (!n.differentiate) return 0;
  int64_t size = n.learned_rates ? int64_t(n.steps) * n.blocks.size() * kTensors : 0;
  for (const Block& b : n.blocks) {
    for (int i = 0; i < kTensors; ++i) size += b.has[i] ? size_of(b, i) : 0;
  }
  return size;
}

template <class T>
void run(const Kernel<T>& kernel, const Network& n, const Layout& layout, Call<T> call,
         const Addresses<T>& addresses, int threads) {
  // The same groups of tasks for any number of threads, each with its own sums.
  const int64_t size = layout.block + int64_t(n.steps) * n.blocks.size() * kTensors;
  const int64_t groups = n.differentiate ? std::min(call.tasks, kMostGroups) : call.tasks;
  const int64_t sums = n.differentiate ? size : 0;
  const int64_t given = layout.block + layout.given;
  T* const shared =
      static_cast<T*>(arena_of_call.at_least((given + groups * sums + 16) * sizeof(T)));
  T* const partials = shared + given;
  pack(n, layout, addresses, shared);
  call.parameters = shared;
  cpu::for_each(groups, threads, [&](int64_t group) {
    T* const partial = partials + group * sums;
    std::fill_n(partial, sums, T(0));
    T* const numbers = static_cast<T*>(arena.at_least(layout.size * sizeof(T)));
    const int64_t last = (group + 1) * call.tasks / groups;
    for (int64_t task = group * call.tasks / groups; task < last; ++task) {
      kernel.run(n, layout, call, task, numbers, partial);
    }
  });
  if (!n.differentiate) return;
  cpu::for_each((sums + kSlice - 1) / kSlice, threads, [&](int64_t slice) {
    const int64_t from = slice * kSlice, to = std::min(from + kSlice, sums);
    // In the order of the groups, whoever computed them.
    for (int64_t group = 1; group < groups; ++group) {
      const T* const partial = partials + group * sums;
      for (int64_t i = from; i < to; ++i) partials[i] += partial[i];
    }
  });
  unpack(n, layout, partials, addresses.gradient);
}

template void run(const Kernel<float>&, const Network&, const Layout&, Call<float>,
                  const Addresses<float>&, int);
template void run(const Kernel<double>&, const Network&, const Layout&, Call<double>,
                  const Addresses<double>&, int);

}  // namespace fastmeta::conv
