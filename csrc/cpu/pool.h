// Threads that share out the indices of a loop.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmeta::cpu {

// What a step must take on one core for others to join in. On a busy machine a thread that is woken,
// or stopped in the middle of its part, is waited for: that may be longer than a short step.
constexpr double kWorthThreads = 1e-3;  // seconds

// Calls `body(0)` ... `body(count - 1)`, each once, on up to `threads` threads, the caller's
// included. An exception of any is thrown here once all have stopped.
void for_each(int64_t count, int threads, const std::function<void(int64_t)>& body);

}  // namespace fastmeta::cpu
