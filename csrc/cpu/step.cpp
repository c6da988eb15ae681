// The fused meta-step on this processor: groups of tasks, spread over threads.

#include "step.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "arena.h"
#include "features.h"
#include "pool.h"

namespace fastmeta::cpu {
namespace {

constexpr int64_t kFewestGroups = 16, kMostGroups = 64, kBytesOfSums = 2 << 20;
constexpr int64_t kVector = 16;       // numbers of the longest one
constexpr int64_t kSlice = 1 << 12;  // of the sums that one thread adds up

thread_local Arena arena, arena_of_sums;
std::atomic<uint64_t> calls{0};
thread_local uint64_t loaded_by = 0;  // the call whose parameters lie in this thread's arena

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(FASTMETA_X86)
  bool has_avx2 = true, has_avx512 = true;
  for (const Feature& feature : features()) {
    const std::string name = feature.name;
    if (name == "avx2" || name == "fma") has_avx2 = has_avx2 && feature.live;
    if (name.rfind("avx512", 0) == 0) has_avx512 = has_avx512 && feature.live;
  }
  if (has_avx512 && has_avx2) found.push_back(avx512());
  if (has_avx2) found.push_back(avx2());
#endif
  found.push_back(baseline());
  found.push_back(plain());
  return found;
}

InstructionSet instruction_set(const std::string& name) {
  const std::vector<InstructionSet> found = instruction_sets();
  if (name.empty()) return found.front();
  std::string names;
  for (const InstructionSet& set : found) {
    if (name == set.name) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("FASTMETA_ISA: '" + name + "', but this processor and build run " +
                              names);
}

template <class T>
void run(const Kernel<T>& kernel, const Description& network, const Layout& layout,
         const Data<T>& data, int threads) {
  // The same groups for any number of threads. Not too many: each has its own sums.
  const int64_t sums = network.differentiate ? gradient_size(network, layout) : 0;
  const int64_t most = std::clamp<int64_t>(kBytesOfSums / (sizeof(T) * (sums + 1)), kFewestGroups,
                                           kMostGroups);
  const int64_t vectors = (data.tasks + kernel.tasks - 1) / kernel.tasks;
  const int64_t least = network.dual ? network.together : 1;
  const int64_t group_tasks =
      ((vectors + most - 1) / most + least - 1) / least * least * kernel.tasks;
  const int64_t groups = (data.tasks + group_tasks - 1) / group_tasks;
  // Each group's begin at a whole vector.
  const int64_t stride = (sums + kVector - 1) / kVector * kVector;
  T* const partials = static_cast<T*>(arena_of_sums.at_least((groups * stride + 1) * sizeof(T)));
  const std::size_t bytes = layout.size * kernel.tasks * sizeof(T);
  const uint64_t call = ++calls;
  for_each(groups, threads, [&](int64_t group) {
    const int64_t first = group * group_tasks;
    T* const partial = partials + group * stride;
    std::fill_n(partial, sums, T(0));
    void* const storage = arena.at_least(bytes);
    const bool loaded = loaded_by == call;
    loaded_by = call;
    kernel.run(network, layout, data, first, std::min(first + group_tasks, data.tasks), loaded,
               storage, partial);
  });
  if (sums == 0) return;
  for_each((sums + kSlice - 1) / kSlice, threads, [&](int64_t slice) {
    const int64_t from = slice * kSlice, to = std::min(from + kSlice, sums);
    // In the order of the groups, whoever computed them.
    for (int64_t group = 1; group < groups; ++group) {
      const T* partial = partials + group * stride;
      for (int64_t i = from; i < to; ++i) partials[i] += partial[i];
    }
  });
  kernel.unpack(network, layout, partials, data.gradient);
}

template void run(const Kernel<float>&, const Description&, const Layout&, const Data<float>&, int);
template void run(const Kernel<double>&, const Description&, const Layout&, const Data<double>&,
                  int);

}  // namespace fastmeta::cpu
