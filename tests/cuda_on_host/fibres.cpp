// The threads of a block as fibres on one thread of the host.

#include "machine_on_host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace fastmeta::cuda::on_host {
namespace {

constexpr std::size_t kStack = 256 << 10;
constexpr int kLanes = 32, kGivenBytes = 24, kNothing = -1;

enum class State { ready, at_barrier, in_shuffle, done };

// _setjmp and _longjmp switch without a system call; a context only makes the first entry.
struct Fibre {
  ucontext_t entry;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool entered;
  State state;
  int site, shuffles;
  // Of this shuffle and the one before, which some may still read.
  alignas(8) char given[2][kGivenBytes];
};

struct Block {
  std::vector<Fibre> fibres;
  jmp_buf scheduler;
  ucontext_t outside;
  int threads = 0, running = 0, skipped = kNothing;
  int64_t index = 0;
  std::unique_ptr<char[]> memory;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
};

std::mutex one_at_a_time;
Block now;
std::atomic<int64_t> barriers{0};

std::string setting(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

int number(const char* name, int otherwise) {
  const std::string value = setting(name);
  return value.empty() ? otherwise : std::stoi(value);
}

void give_way() {
  if (_setjmp(now.fibres[now.running].at) == 0) _longjmp(now.scheduler, 1);
}

void enter() {
  now.body(now.context);
  now.fibres[now.running].state = State::done;
  _longjmp(now.scheduler, 1);
}

// Not inlined: what a caller keeps in registers would not survive the jump.
__attribute__((noinline)) void resume(int fibre) {
  now.running = fibre;
  Fibre& f = now.fibres[fibre];
  if (_setjmp(now.scheduler) != 0) return;
  if (f.entered) _longjmp(f.at, 1);
  f.entered = true;
  setcontext(&f.entry);
}

// Wakes the warps whose lanes have all given their numbers, or the block once all are at one
// barrier. False where nobody can go on.
bool wake() {
  bool woken = false;
  for (int warp = 0; warp < now.threads; warp += kLanes) {
    const auto begin = now.fibres.begin() + warp, end = begin + kLanes;
    const auto gave = [](const Fibre& f) { return f.state == State::in_shuffle; };
    if (!std::all_of(begin, end, gave)) continue;
    std::for_each(begin, end, [](Fibre& f) { f.state = State::ready; });
    woken = true;
  }
  if (woken) return true;
  const auto begin = now.fibres.begin(), end = begin + now.threads;
  const int site = now.fibres[0].site;
  const bool all = std::all_of(begin, end, [site](const Fibre& f) {
    return f.state == State::at_barrier && f.site == site;
  });
  if (all) std::for_each(begin, end, [](Fibre& f) { f.state = State::ready; });
  return all;
}

void run_block(std::mt19937& random) {
  std::vector<int> order(now.threads);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < now.threads; ++i) {
    Fibre& f = now.fibres[i];
    f.entered = false, f.state = State::ready, f.site = kNothing, f.shuffles = 0;
    getcontext(&f.entry);
    f.entry.uc_stack.ss_sp = f.stack.get();
    f.entry.uc_stack.ss_size = kStack;
    f.entry.uc_link = nullptr;
    makecontext(&f.entry, enter, 0);
  }
  const auto is_done = [](int i) { return now.fibres[i].state == State::done; };
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      if (now.fibres[i].state == State::ready) resume(i);
    }
    if (std::all_of(order.begin(), order.end(), is_done)) return;
  } while (wake());
  throw std::logic_error("threads of a block wait at different barriers");
}

}  // namespace

int thread() { return now.running; }
int threads() { return now.threads; }
int64_t block() { return now.index; }
void* shared() { return now.memory.get(); }

void wait_for_block(int site) {
  if (site == now.skipped) return;
  if (now.running == 0) ++barriers;
  now.fibres[now.running].state = State::at_barrier;
  now.fibres[now.running].site = site;
  give_way();
}

Given give(const void* numbers, std::size_t bytes) {
  const int me = now.running, turn = now.fibres[me].shuffles++ % 2;
  if (bytes > kGivenBytes) throw std::logic_error("more bytes than a lane can give");
  std::memcpy(now.fibres[me].given[turn], numbers, bytes);
  now.fibres[me].state = State::in_shuffle;
  give_way();
  return {me / kLanes * kLanes, turn};
}

const void* Given::of(int lane) const { return now.fibres[first + lane].given[turn]; }

void run(int64_t blocks, int threads, std::size_t bytes, void (*body)(const void*),
         const void* context) {
  const std::lock_guard<std::mutex> alone(one_at_a_time);
  std::mt19937 random(number("FASTMETA_CUDA_SEED", 0));
  now.skipped = number("FASTMETA_CUDA_SKIP", kNothing);
  while (int(now.fibres.size()) < threads) now.fibres.emplace_back();
  now.threads = threads, now.body = body, now.context = context;
  // Exactly as many bytes as were asked for, so that an address sanitizer sees one more.
  now.memory.reset(new char[bytes]);
  for (int64_t i = 0; i < blocks; ++i) {
    std::memset(now.memory.get(), 0xff, bytes);  // no number, in float and in double
    now.index = i;
    run_block(random);
  }
}

void fail_if_asked(const char* what, const std::string& message) {
  if (setting("FASTMETA_CUDA_FAIL") == what) throw std::runtime_error(message);
}

int64_t shared_bytes() { return number("FASTMETA_CUDA_SHARED", 227 << 10); }
int multiprocessors() { return number("FASTMETA_CUDA_MULTIPROCESSORS", 132); }

}  // namespace fastmeta::cuda::on_host

// How many barriers blocks have passed so far, for tests that count them.
extern "C" __attribute__((visibility("default"))) int64_t fastmeta_barriers_passed() { return fastmeta::cuda::on_host::barriers; }
