// The fused meta-step on this processor: groups of tasks, spread over threads.

#include "step.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "arena.h"
#include "features.h"
#include "parts.h"
#include "pool.h"
#include "program_memory.h"

namespace fastmeta::cpu {
namespace {

constexpr int64_t kFewestGroups = 16, kMostGroups = 64, kBytesOfSums = 2 << 20;
constexpr int64_t kVector = 16;       // lanes of the longest one
constexpr int64_t kSlice = 1 << 12;  // of the sums that one thread adds up

thread_local Arena arena, arena_of_sums;
std::atomic<uint64_t> calls{0};
thread_local int threads_of_parts = 1;
thread_local uint64_t loaded_by = 0;  // the call whose parameters lie in this thread's arena

// Lends threads to the parts of the chunks that this thread computes meanwhile.
class LentThreads {
 public:
  explicit LentThreads(int threads) { threads_of_parts = threads; }
  LentThreads(const LentThreads&) = delete;
  LentThreads& operator=(const LentThreads&) = delete;
  ~LentThreads() { threads_of_parts = 1; }
};

}  // namespace

void* program_memory(std::size_t bytes) {
  static thread_local Arena arena;
  return arena.at_least(bytes);
}

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

namespace {

// How the tasks are cut for threads: the same for any number of them. Not too many, because each
// has its own sums.
struct Groups {
  int64_t tasks, count;  // of each, and how many groups
  int64_t stride;        // of their sums: each group's begin at a whole vector

  template <class T>
  Groups(const Kernel<T>& kernel, int64_t all, int64_t sums, int64_t least) {
    const int64_t most = std::clamp<int64_t>(kBytesOfSums / (sizeof(T) * (sums + 1)),
                                             kFewestGroups, kMostGroups);
    const int64_t vectors = (all + kernel.tasks - 1) / kernel.tasks;
    tasks = ((vectors + most - 1) / most + least - 1) / least * least * kernel.tasks;
    count = (all + tasks - 1) / tasks;
    stride = (sums + kVector - 1) / kVector * kVector;
  }

  // `compute(first task, last, sums)` of each group; the sums of them all are the first one's.
  template <class T, class Compute>
  T* run(int64_t all, int64_t sums, int threads, Compute compute) const {
    T* const partials = static_cast<T*>(arena_of_sums.at_least((count * stride + 1) * sizeof(T)));
    for_each(count, threads, [&](int64_t group) {
      const int64_t first = group * tasks;
      T* const partial = partials + group * stride;
      std::fill_n(partial, sums, T(0));
      compute(first, std::min(first + tasks, all), partial);
    });
    if (count == 1) return partials;
    for_each((sums + kSlice - 1) / kSlice, threads, [&](int64_t slice) {
      const int64_t from = slice * kSlice, to = std::min(from + kSlice, sums);
      // In the order of the groups, whoever computed them.
      for (int64_t group = 1; group < count; ++group) {
        const T* partial = partials + group * stride;
        for (int64_t i = from; i < to; ++i) partials[i] += partial[i];
      }
    });
    return partials;
  }
};

}  // namespace

template <class T>
void run(const Kernel<T>& kernel, const Description& network, const Layout& layout,
         const Data<T>& data, int threads) {
  const int64_t sums = network.differentiate ? gradient_size(network, layout) : 0;
  const Groups groups(kernel, data.tasks, sums, network.dual ? network.together : 1);
  const std::size_t bytes = layout.size * kernel.tasks * sizeof(T);
  const uint64_t call = ++calls;
  const T* total = groups.template run<T>(
      data.tasks, sums, threads, [&](int64_t first, int64_t last, T* partial) {
        void* const storage = arena.at_least(bytes);
        const bool loaded = loaded_by == call;
        loaded_by = call;
        const LentThreads lent(groups.count == 1 ? threads : 1);
        kernel.run(network, layout, data, first, last, loaded, storage, partial);
      });
  if (sums > 0) kernel.unpack(network, layout, total, data.gradient);
}

void share(int count, void (*run)(void* context, int part), void* context) {
  if (threads_of_parts > 1) {
    for_each(count, threads_of_parts, [=](int64_t part) { run(context, int(part)); });
  } else {
    for (int part = 0; part < count; ++part) run(context, part);
  }
}

template <class T>
int64_t open_stride(const Kernel<T>& kernel, const Layout& layout) {
  const int64_t line = kVector * sizeof(T);
  return (layout.size * kernel.tasks * int64_t(sizeof(T)) + line - 1) / line * line;
}

template <class T>
void run(const Kernel<T>& kernel, const Description& network, const Layout& layout,
         const Data<T>& data, const OpenCall<T>& call, char* storage, int threads) {
  const int64_t sums = call.summed == nullptr ? 0 : gradient_size(network, layout);
  const Groups groups(kernel, data.tasks, sums, 1);
  const int64_t stride = open_stride(kernel, layout);
  const T* total = groups.template run<T>(
      data.tasks, sums, threads, [&](int64_t first, int64_t last, T* partial) {
        kernel.open(network, layout, data, call, first, last, storage, stride, partial);
      });
  if (sums > 0) kernel.unpack(network, layout, total, call.summed);
}

#define FASTMETA_FOR(T)                                                                        \
  template void run(const Kernel<T>&, const Description&, const Layout&, const Data<T>&, int); \
  template int64_t open_stride(const Kernel<T>&, const Layout&);                               \
  template void run(const Kernel<T>&, const Description&, const Layout&, const Data<T>&,       \
                    const OpenCall<T>&, char*, int);
FASTMETA_FOR(float)
FASTMETA_FOR(double)
#undef FASTMETA_FOR

}  // namespace fastmeta::cpu
