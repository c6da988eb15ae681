// The convolutional meta-step on this processor: tasks spread over threads.

#include "conv_step.h"

#include <algorithm>
#include <cstdint>

#include "../arena.h"
#include "../pool.h"

namespace fastmeta::conv {
namespace {

constexpr int64_t kMostGroups = 16;
constexpr int64_t kSlice = 1 << 14;  // of the sums that one thread adds up

thread_local cpu::Arena arena, arena_of_call;

}  // namespace

Kernels kernels(const std::string& instruction_set) {
#if defined(FASTMETA_X86)
  if (instruction_set == "avx512") return avx512();
  if (instruction_set == "avx2") return avx2();
#endif
  return instruction_set == "plain" ? plain() : baseline();
}

double seconds(const Network& n, const Layout& layout, int lanes) {
  constexpr double kMultiplyAdd = 0.3e-9;  // of vectors, on whole steps
  const double inner = sweeps(n) && !n.first_order ? 9 : 3, outer = n.differentiate ? 3 : 1;
  double multiplies = 0;
  for (int l = 0; l < int(n.blocks.size()); ++l) {
    const Shape& s = layout.shapes[l];
    const double steps = l < layout.body ? n.steps > 0 : n.steps;
    multiplies += double(s.pixels()) * s.depth() * s.out * (inner * steps * n.support + outer * n.query);
  }
  return kMultiplyAdd * multiplies / lanes;
}

template <class T>
void run(const Kernel<T>& kernel, const Network& n, const Layout& layout, Call<T> call,
         const Addresses<T>& addresses, int threads) {
  // The same groups of tasks for any number of threads, each with its own sums.
  const int64_t groups = n.differentiate ? std::min(call.tasks, kMostGroups) : call.tasks;
  const int64_t sums = n.differentiate ? sums_size(n, layout) : 0;
  const int64_t packed = packed_size(n, layout);
  T* const shared =
      static_cast<T*>(arena_of_call.at_least((packed + groups * sums + 16) * sizeof(T)));
  T* const partials = shared + packed;
  pack(n, layout, addresses, shared);
  call.parameters = shared;
  call.rates = n.elementwise_rates ? shared + layout.block + layout.given : addresses.rates;
  cpu::for_each(groups, threads, [&](int64_t group) {
    T* const partial = partials + group * sums;
    std::fill_n(partial, sums, T(0));
    T* const workspace = static_cast<T*>(arena.at_least(layout.size * sizeof(T)));
    const int64_t last = (group + 1) * call.tasks / groups;
    for (int64_t task = group * call.tasks / groups; task < last; ++task) {
      kernel.run(n, layout, call, task, workspace, partial);
      if (addresses.adapted.empty()) continue;
      unpack_adapted(n, layout, n.steps > 0 ? workspace + layout.weights : shared, task, addresses);
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
