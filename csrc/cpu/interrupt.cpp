// Early ends of long work: where another thread failed, or a check of the caller's throws.

#include "interrupt.h"

#include <chrono>
#include <exception>
#include <thread>

#include "budget.h"

namespace fastmeta::cpu {
namespace {

constexpr int64_t kBudget = 1 << 21;  // well under a millisecond, twenty times as much at worst

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kBetween{50};

// The check of a call, and when it is due.
struct Watch {
  Check check;
  bool begun = false;
  Clock::time_point due{};

  void look() {
    if (check == nullptr) return;
    const Clock::time_point now = Clock::now();
    if (begun && now < due) return;
    if (begun && !check()) check = nullptr;
    begun = true;
    due = Clock::now() + kBetween;
  }
};

struct Thread {
  Budget budget{kBudget};
  const std::atomic<bool>* stopping = nullptr;
  Watch* watch = nullptr;  // of the call that this thread made
};

thread_local Thread thread;

// Calls `work` on another thread, and waits for it.
void elsewhere(const std::function<void()>& work) {
  std::exception_ptr error;
  std::thread([&] {
    try {
      work();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

struct Watched {
  explicit Watched(Watch& watch) { thread.watch = &watch; }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
  ~Watched() { thread.watch = nullptr; }
};

}  // namespace

Budget& budget() { return thread.budget; }

void look(Budget& budget) {
  budget.left = kBudget;
  if (thread.stopping != nullptr && thread.stopping->load(std::memory_order_relaxed)) {
    throw Stopped();
  }
  check_if_due();
}

void check_if_due() {
  if (thread.watch != nullptr) thread.watch->look();
}

Stoppable::Stoppable(const std::atomic<bool>& stopping) { thread.stopping = &stopping; }
Stoppable::~Stoppable() { thread.stopping = nullptr; }

void interruptible(Check check, const std::function<void()>& work) {
  if (thread.watch != nullptr) return elsewhere(work);
  Watch watch{check};
  const Watched watched(watch);
  work();
}

}  // namespace fastmeta::cpu
