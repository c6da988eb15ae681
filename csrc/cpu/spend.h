// Counts work, so that long work looks now and then whether to stop.
#pragma once

#include "budget.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// `work`: multiply-adds of vectors done since the last time. Throws as `look` does.
__attribute__((always_inline)) inline void spend(cpu::Budget& budget, int64_t work) {
  budget.left -= work;
  if (__builtin_expect(budget.left < 0, 0)) cpu::look(budget);
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
