// How a step is laid over blocks, in which form, and where its tasks lie.
#pragma once

#include <cstdint>
#include <string>

#include "step.h"

namespace fastmeta::cuda {

struct Choice {
  Description network;  // in dual form its first layer has no inputs: others multiply with those
  Layout layout;
  Shape shape;
  int64_t task_bytes;  // of shared memory, if a task lies there
  bool serves;
};

// What to force, where it can serve; empty or 0 where that is left open.
struct Wishes {
  std::string form;     // primal, dual
  std::string memory;   // saved, reversible
  std::string storage;  // shared, workspace
  int threads;          // of a block
};

// The first form that fits into shared memory, its inner loop run backward where that makes room for
// enough tasks at a time; where none fits, the better form in a workspace. Throws
// std::invalid_argument where a name is unknown.
Choice choose(const Description&, int64_t tasks, bool is_double, const Wishes&, const Limits&);

}  // namespace fastmeta::cuda
