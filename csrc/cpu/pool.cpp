// Threads that share out the indices of a loop.

#include "pool.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "budget.h"
#include "interrupt.h"

namespace fastmeta::cpu {
namespace {

constexpr int64_t kIndexBudget = 1 << 14;  // what an index takes at least, for the clock
constexpr int kSpins = 20000;              // tens of microseconds
constexpr std::chrono::milliseconds kWait{20};

struct Loop {
  Loop(int64_t count, const std::function<void(int64_t)>& body)
      : count(count), body(body), unfinished(count) {}

  const int64_t count;
  const std::function<void(int64_t)>& body;
  std::exception_ptr error;

  // Takes indices while there are any. The caller then waits for the others' last ones.
  void work() {
    take_indices();
    if (unfinished > 0 && std::this_thread::get_id() == caller) wait();
  }

 private:
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> next{0}, unfinished;
  std::atomic<bool> failed{false};
  std::mutex guard;
  std::condition_variable finished;

  void take_indices() {
    const Stoppable stoppable(failed);
    Budget& budget = cpu::budget();
    for (int64_t i = next++; i < count; i = next++) {
      try {
        if ((budget.left -= kIndexBudget) < 0) look(budget);
        if (!failed) body(i);
      } catch (const Stopped&) {  // the first error is what counts
      } catch (...) {
        fail(std::current_exception());
      }
      if (--unfinished > 0) continue;
      std::lock_guard<std::mutex> lock(guard);
      finished.notify_all();
    }
  }
  void wait() {
    // Not by yielding: on a busy core that would give others their whole slice of time.
    for (int i = 0; i < kSpins && unfinished > 0; ++i) {
    }
    while (unfinished > 0) {
      try {
        check_if_due();
      } catch (...) {
        fail(std::current_exception());
      }
      std::unique_lock<std::mutex> lock(guard);
      finished.wait_until(lock, std::chrono::system_clock::now() + kWait,
                          [this] { return unfinished == 0; });
    }
  }
  void fail(std::exception_ptr with) {
    std::lock_guard<std::mutex> lock(guard);
    if (!error) error = with;
    failed = true;
  }
};

// Workers sleep between loops. One loop at a time; a second caller runs its own alone.
class Pool {
 public:
  void run(Loop& loop, int helpers) {
    std::unique_lock<std::mutex> busy(one_loop_, std::try_to_lock);
    if (!busy.owns_lock()) return loop.work();
    {
      std::lock_guard<std::mutex> lock(guard_);
      while (int(workers_) < helpers) {
        std::thread(&Pool::wait_for_work, this).detach();
        ++workers_;
      }
      loop_ = &loop;
      wanted_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock<std::mutex> lock(guard_);
    wanted_ = 0;  // who has not begun need not
    loop_ = nullptr;
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  std::mutex one_loop_, guard_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int workers_ = 0, wanted_ = 0, working_ = 0;
  uint64_t round_ = 0;

  void wait_for_work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(guard_);
    for (;;) {
      wake_.wait(lock, [&] { return wanted_ > 0 && round_ != seen; });
      seen = round_;
      --wanted_;
      ++working_;
      Loop* loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--working_ == 0) done_.notify_all();
    }
  }
};

struct Owned {
  explicit Owned(pid_t process) : process(process) {}
  const pid_t process;
  Pool pool;
};

// A forked child has none of its parent's threads, and maybe a locked mutex: it takes a new pool.
// Of several threads that come first, one makes it. Pools in use are never destroyed, because their
// threads outlive `main`.
Pool& pool() {
  static std::atomic<Owned*> current{nullptr};
  const pid_t self = getpid();
  Owned* found = current.load();
  if (found != nullptr && found->process == self) return found->pool;
  auto made = std::make_unique<Owned>(self);
  if (current.compare_exchange_strong(found, made.get())) return made.release()->pool;
  return found->pool;
}

// The entry to a parallel region of GCC's OpenMP, which LLVM's and Intel's have too.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

const pid_t loaded_in = getpid();

// The OpenMP that this process has loaded, torch's, or null. Its workers spin for milliseconds after
// every region, so threads of our own would have to share cores with them: it takes the loop. Not
// in a forked child, where it hangs.
Parallel openmp() {
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == loaded_in ? found : nullptr;
}

// Of as many threads as torch's regions have: a team that changes its size starts threads anew.
void run(Loop& loop, int threads, Parallel parallel) {
  static std::mutex one_loop;
  std::unique_lock<std::mutex> busy(one_loop, std::try_to_lock);
  if (!busy.owns_lock()) return loop.work();
  parallel([](void* data) { static_cast<Loop*>(data)->work(); }, &loop, unsigned(threads), 0);
}

}  // namespace

void for_each(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  Loop loop(count, body);
  const int helpers = int(threads < count ? threads : count) - 1;
  if (helpers <= 0) {
    loop.work();
  } else if (const Parallel parallel = openmp()) {
    run(loop, threads, parallel);
  } else {
    pool().run(loop, helpers);
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace fastmeta::cpu
