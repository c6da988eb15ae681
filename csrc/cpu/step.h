// The fused meta-step on this processor: groups of tasks, spread over threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastmeta::cpu {

// The instruction sets that this build holds and this processor runs, the best first; "plain" last.
std::vector<InstructionSet> instruction_sets();

// The one named; an empty name is the best. Throws std::invalid_argument where there is none.
InstructionSet instruction_set(const std::string& name);

struct Chosen {
  Engine engine;
  double seconds;  // what the step may take on one core, roughly
};

// The engine of that name, or, where the name is empty, the faster one for so many tasks: the same
// for any number of threads. Throws std::invalid_argument where there is none.
Chosen choose_engine(const InstructionSet&, const std::string& name, const Description&,
                     int64_t tasks, bool is_double);

// Runs all groups on up to `threads` threads; the same bits for any number of them.
template <class T>
void run(const Kernel<T>&, const Description&, const Layout&, const Data<T>&, int threads);

// How many bytes the storage of open passes takes for each vector of tasks.
template <class T>
int64_t open_stride(const Kernel<T>&, const Layout&);

// Makes one pass of all tasks, likewise.
template <class T>
void run(const Kernel<T>&, const Description&, const Layout&, const Data<T>&, const OpenCall<T>&,
         char* storage, int threads);

// Whether the first layer's product is taken in dual form; a name forces one, where it can serve.
bool dual(const std::string& name, const Description&);

// Whether the reverse sweep rebuilds the weights of the inner steps, a block of which takes so many
// bytes; a name forces it, where there is anything to rebuild.
bool reversible(const std::string& name, const Description&, int64_t block_bytes);

// Bytes of the storage of tasks that go together above which sets are cut into chunks, and above which
// what chunks leave does not stay for the Hessian products; and the former where chunks compute more,
// in primal form or with a body that runs at every step.
constexpr int64_t kLarge = 64 << 20, kHuge = 1 << 30;

// Cuts long sets into chunks that go through the layers one after another, where the storage, in
// scalars, would be large, or where all tasks are one group, whose chunks threads had better share. A
// number of examples forces them, where they can serve, and "0" forbids them.
void cut(const std::string& chunk, const std::string& form, Description&, int64_t groups, int bytes,
         int64_t storage);

// How many tasks share the dual form's products with the weight: enough rows for it, and still
// work for several threads. From the sizes alone, so that it changes no bit.
int together(const Description&, int64_t tasks);

}  // namespace fastmeta::cpu
