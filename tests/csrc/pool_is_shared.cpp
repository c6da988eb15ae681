// The pool of threads under several callers at once and across fork: `pool_is_shared [ROUNDS]`.

#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "cpu/budget.h"
#include "cpu/interrupt.h"
#include "cpu/pool.h"
#include "drawing.h"

namespace fastmeta::tests {
namespace {

void check(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  std::fflush(stdout);
  _exit(1);
}

int threads_of_this_process() {
  int count = 0;
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return -1;
  while (dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count;
}

template <class Body>
void in_a_child(Body body) {
  std::fflush(stdout);
  const pid_t child = fork();
  check(child >= 0, "fork failed");
  if (child == 0) {
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(status == 0, "a child failed");
}

// Calls `body(0)` ... `body(count - 1)` on as many threads, all let go at once.
template <class Body>
void at_once(int count, Body body) {
  std::atomic<int> waiting{count};
  std::vector<std::thread> callers;
  for (int i = 0; i < count; ++i) {
    callers.emplace_back([&, i] {
      --waiting;
      while (waiting.load() > 0) {
      }
      body(i);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void every_index_once() {
  for (int threads : {1, 2, 5}) {
    for (int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> seen(count);
      cpu::for_each(count, threads, [&](int64_t i) { ++seen[i]; });
      for (const auto& times : seen) check(times == 1, "an index was not called once");
    }
  }
}

void an_exception_arrives_and_harms_nothing() {
  for (int threads : {1, 3}) {
    bool thrown = false;
    std::atomic<int> called{0};
    try {
      cpu::for_each(100, threads, [&](int64_t i) {
        ++called;
        if (i % 7 == 3) throw std::runtime_error("seven");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    check(thrown && called < 100, "an exception got lost, or did not end its loop");
  }
  every_index_once();
}

struct Interrupted {};

[[noreturn]] void work_for_ever() {
  for (;;) cpu::look(cpu::budget());
}

// The caller's own work is long, or that of the others for whom it waits.
void a_check_ends_every_thread() {
  for (int threads : {1, 3}) {
    for (int64_t count : {2, 100}) {
      const auto caller = std::this_thread::get_id();
      const auto body = [&](int64_t) {
        const bool waits = threads > 1 && std::this_thread::get_id() == caller;
        if (!waits) work_for_ever();
        usleep(1000);
      };
      bool thrown = false;
      try {
        cpu::interruptible([]() -> bool { throw Interrupted(); },
                           [&] { cpu::for_each(count, threads, body); });
      } catch (const Interrupted&) {
        thrown = true;
      }
      check(thrown, "a check did not end its loop");
      every_index_once();
    }
  }
}

std::atomic<int> checks{0};

// A signal's handler may call for a step itself.
void a_check_may_compute() {
  cpu::interruptible(
      [] {
        cpu::interruptible(nullptr, every_index_once);
        return ++checks < 2;
      },
      [] {
        while (checks < 2) cpu::look(cpu::budget());
        for (int i = 0; i < 1000; ++i) cpu::look(cpu::budget());
      });
  check(checks == 2, "a check was called that had asked for no more");
}

// A process has one pool, whoever comes first: the threads of a second one would stay for ever.
void first_callers_share_a_pool(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    in_a_child([] {
      constexpr int callers = 4;
      // A sanitizer may have a thread of its own, which it starts with the first other one.
      std::thread([] {}).join();
      const int before_all = threads_of_this_process();
      std::atomic<int> done{0}, most{0};
      at_once(callers, [&](int) {
        cpu::for_each(2, 2, [](int64_t) { usleep(50); });
        ++done;
        while (done.load() < callers) usleep(50);
        int seen = threads_of_this_process();
        for (int before = most; before < seen && !most.compare_exchange_weak(before, seen);) {
        }
      });
      // One loop at a time asks for a helper.
      check(most <= before_all + callers + 1, "first callers made a pool each");
    });
  }
}

struct Step {
  Problem problem;
  cpu::Engine engine;
  Inputs<float> in;
  Results<float> expected;
};

std::vector<Step> steps(int count) {
  std::vector<Step> found;
  for (int number = 0; int(found.size()) < count; ++number) {
    Problem problem = draw(number);
    problem.tasks = 40;
    const cpu::InstructionSet best = cpu::instruction_set("");
    Step step{problem, number % 2 ? best.features : best.tasks, inputs<float>(problem), {}};
    step.expected = run(step.engine, problem, step.in, 1);
    found.push_back(std::move(step));
  }
  return found;
}

void repeat(const std::vector<Step>& steps, int threads) {
  for (const Step& step : steps) {
    check(same(run(step.engine, step.problem, step.in, threads), step.expected),
          "company changes a step's bits");
  }
}

void callers_do_not_disturb_each_other(const std::vector<Step>& steps, int rounds) {
  at_once(4, [&](int caller) {
    for (int round = 0; round < rounds; ++round) repeat(steps, 1 + (caller + round) % 3);
  });
}

void gets_a_helper() {
  cpu::for_each(2, 2, [](int64_t) {});
  check(threads_of_this_process() == 2, "a child has no helpers");
}

// Children begin while the parent's pool is at work, and while its locks are held.
void a_child_is_free_of_its_parents_threads(const std::vector<Step>& steps, int rounds) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (int caller = 0; caller < 2; ++caller) {
    busy.emplace_back([&] {
      while (!stop) repeat(steps, 2);
    });
  }
  for (int round = 0; round < rounds; ++round) {
    in_a_child([&] {
      alarm(60);  // one that hangs is one that failed
      gets_a_helper();
      repeat(steps, 2);
      in_a_child([&] {
        gets_a_helper();
        repeat(steps, 3);
      });
    });
  }
  stop = true;
  for (std::thread& caller : busy) caller.join();
}

}  // namespace
}  // namespace fastmeta::tests

int main(int count, char** arguments) {
  using namespace fastmeta::tests;
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 200;
  first_callers_share_a_pool(rounds);  // before this process has a pool itself
  every_index_once();
  an_exception_arrives_and_harms_nothing();
  a_check_ends_every_thread();
  a_check_may_compute();
  const std::vector<Step> drawn = steps(12);
  callers_do_not_disturb_each_other(drawn, rounds / 10);
#if !defined(__SANITIZE_THREAD__)  // which knows no fork of a process with several threads
  a_child_is_free_of_its_parents_threads(drawn, rounds / 10);
#endif
  std::printf("%d rounds, none wrong\n", rounds);
}
