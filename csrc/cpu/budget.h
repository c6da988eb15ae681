// What a thread computes until it looks whether to stop.
#pragma once

#include <cstdint>

namespace fastmeta::cpu {

// What is left of it, in multiply-adds of vectors. A clock is read when it is spent, too seldom to
// cost anything, and never in a short call.
struct Budget {
  int64_t left;
};

// This thread's.
Budget& budget();

// Refills it. Throws where the loop that this thread works on has failed elsewhere, or what the
// check of `interruptible` throws.
void look(Budget&);

}  // namespace fastmeta::cpu
