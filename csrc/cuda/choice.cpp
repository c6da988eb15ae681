// How a step is laid over blocks, in which form, and where its tasks lie.

#include "choice.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace fastmeta::cuda {
namespace {

// Multiply-adds of one task's first layer from which the dual form's six more launches pay. By
// count, not measured: about ten microseconds of one multiprocessor at half its peak.
constexpr double kWorthLaunches = 1 << 20;
// Of a multiprocessor, from compute capability 8.0 on: blocks at a time, and what each takes of
// shared memory besides.
constexpr int64_t kMostAtOnce = 32, kReserved = 1024;
// With a workspace, whose memory counts: two blocks of the most threads on each of 132
// multiprocessors are 264.
constexpr int64_t kMostInWorkspace = 256;
// A wider layer should be multiplied by all multiprocessors together, as the general path has it;
// where the one beats the other was not measured.
constexpr int kWidest = 512;

void check_name(const char* variable, const std::string& name, const char* one, const char* other) {
  if (name.empty() || name == one || name == other) return;
  throw std::invalid_argument(std::string(variable) + ": '" + name + "', but it must be " + one +
                              ", " + other + " or unset");
}

bool can_be_dual(const Description& network) {
  if (network.per_step_support || (network.body == 0 && !steps_in_dual_form(network))) return false;
  return !network.elementwise_rates && network.prox == 0 && network.query > 0;
}

bool is_better_dual(const Description& network) {
  const Dense& first = network.layers.front();
  const double second = network.differentiate && !network.first_order ? 2 : 1;
  const double steps = first.adapts[kWeight] ? 2 * second * network.steps : 1;
  const double products = steps * network.support + 2.0 * network.query;
  return products * first.in * first.out > kWorthLaunches;
}

// With a proximal term rates decide whether the inner loop can be run backward, and they are on the
// device.
bool can_be_reversible(const Description& network) {
  return sweeps(network) && network.steps > 1 && network.prox == 0 && is_plain(network.rule);
}

// The names that may serve, the better one first.
std::vector<bool> tries(const std::string& forced, const char* first, const char* second,
                        bool second_can, bool second_is_better) {
  if (!second_can || forced == first) return {false};
  if (forced == second) return {true};
  return {second_is_better, !second_is_better};
}

int widest(const Description& network) {
  int width = 0;
  for (const Dense& layer : network.layers) width = std::max({width, layer.in, layer.out});
  return width;
}

// How many blocks a multiprocessor holds: its shared memory is that of one block and what is reserved.
int64_t blocks_in_memory(const Shape& shape, const Limits& limits) {
  return (limits.shared_bytes + kReserved) / (shape.shared_bytes + kReserved);
}
int64_t blocks_at_once(const Shape& shape, const Limits& limits) {
  const int64_t registers = kThreadsAtOnce / shape.threads;
  return std::max<int64_t>(1, std::min({kMostAtOnce, blocks_in_memory(shape, limits), registers}));
}

// By estimate, in multiply-adds for each weight behind the first layer: as many tasks after each other
// as there are for a block, each as long as its products, whoever runs beside it. So it is where
// operations wait for each other, not for the multiprocessor.
double time_of(const Choice& choice, int64_t tasks) {
  const Description& network = choice.network;
  const int64_t after_each_other = (tasks + choice.shape.blocks - 1) / choice.shape.blocks;
  const double of_step = network.reversible ? 10 : 9;
  return double(after_each_other) * (of_step * network.steps * network.support + 3.0 * network.query);
}

// Large blocks keep a multiprocessor at work that has one task; where there are several, registers are
// for half of the most threads three times, for the most threads once.
int most_threads(const Shape& shape, int64_t tasks, const Limits& limits) {
  const bool several = tasks > limits.multiprocessors && blocks_in_memory(shape, limits) > 1;
  return several ? kMostThreads / 2 : kMostThreads;
}

int block_threads(const Description& network, int most) {
  const int examples = std::max(network.support, network.query);
  int64_t entries = 0;
  for (const Dense& layer : network.layers) {
    entries = std::max(entries, int64_t(examples) * layer.out);
  }
  int threads = 32;
  // Four elements each: a tile of 2 x 2, or with three others one of 4 x 4.
  while (threads < most && threads * 4 < entries) threads *= 2;
  return threads;
}

}  // namespace

Choice choose(const Description& network, int64_t tasks, bool is_double, const Wishes& wishes,
              const Limits& limits) {
  check_name("FASTMETA_FORM", wishes.form, "primal", "dual");
  check_name("FASTMETA_MEMORY", wishes.memory, "saved", "reversible");
  check_name("FASTMETA_CUDA_STORAGE", wishes.storage, "shared", "workspace");
  const int threads = wishes.threads;
  if (threads != 0 && (threads < 32 || threads > kMostThreads || (threads & (threads - 1)) != 0)) {
    throw std::invalid_argument("FASTMETA_CUDA_THREADS: " + std::to_string(threads) +
                                ", but it must be a power of two from 32 to " +
                                std::to_string(kMostThreads) + ", or unset");
  }
  std::vector<Choice> too_large;
  for (const bool dual : tries(wishes.form, "primal", "dual", can_be_dual(network),
                               is_better_dual(network))) {
    std::vector<Choice> fit;
    for (const bool reversible : tries(wishes.memory, "saved", "reversible",
                                       can_be_reversible(network), false)) {
      Choice choice{};
      choice.network = network;
      choice.network.dual = dual;
      choice.network.reversible = reversible;
      if (dual) choice.network.layers.front().in = 0;
      choice.layout = lay_out(choice.network, 1, is_double ? Rows::odd : Rows::float4);
      const int64_t number = is_double ? 8 : 4;
      choice.task_bytes = (choice.layout.size + kScratch) * number;
      choice.shape.shared_bytes = choice.task_bytes;
      choice.shape.threads =
          threads > 0 ? threads : block_threads(network, most_threads(choice.shape, tasks, limits));
      choice.shape.blocks =
          std::min(tasks, limits.multiprocessors * blocks_at_once(choice.shape, limits));
      choice.serves = choice.task_bytes <= limits.shared_bytes && wishes.storage != "workspace";
      (choice.serves ? fit : too_large).push_back(choice);
    }
    if (fit.empty()) continue;
    return *std::min_element(fit.begin(), fit.end(), [tasks](const Choice& a, const Choice& b) {
      return time_of(a, tasks) < time_of(b, tasks);
    });
  }
  Choice best = too_large.front();
  best.serves = wishes.storage == "workspace" ||
                (wishes.storage.empty() && widest(best.network) <= kWidest);
  best.shape.blocks = std::min(tasks, kMostInWorkspace);
  best.shape.shared_bytes = kScratch * (is_double ? 8 : 4);
  best.shape.workspace = best.shape.blocks * best.layout.size;
  return best;
}

}  // namespace fastmeta::cuda
