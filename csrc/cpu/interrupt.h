// Early ends of long work: where another thread failed, or a check of the caller's throws.
#pragma once

#include <atomic>
#include <functional>

namespace fastmeta::cpu {

// Calls the check of `interruptible` where it is due and this is its thread.
void check_if_due();

// What `look` throws on a thread whose loop has failed elsewhere.
struct Stopped {};

// While it lives, `look` throws on this thread where `stopping` is set.
class Stoppable {
 public:
  explicit Stoppable(const std::atomic<bool>& stopping);
  Stoppable(const Stoppable&) = delete;
  Stoppable& operator=(const Stoppable&) = delete;
  ~Stoppable();
};

// Returns whether to call it again. May throw, which ends the work.
using Check = bool (*)();

// Calls `work`, and `check` on this thread every 50 ms of it. A call out of a check runs on a thread
// of its own, because this one's memory is in use; it is not checked.
void interruptible(Check check, const std::function<void()>& work);

}  // namespace fastmeta::cpu
