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
// More would be partial sums for nothing: no device runs as many at a time.
constexpr int64_t kMostBlocks = 1024;
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
  return sweeps(network) && network.steps > 1 && network.prox == 0;
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

void spread(Choice& choice, int64_t tasks, int64_t most_blocks) {
  choice.tasks_each = (tasks + most_blocks - 1) / most_blocks;
  choice.shape.blocks = (tasks + choice.tasks_each - 1) / choice.tasks_each;
}

int block_threads(const Description& network) {
  const int examples = std::max(network.support, network.query);
  int64_t numbers = 0;
  for (const Dense& layer : network.layers) {
    numbers = std::max(numbers, int64_t(examples) * layer.out);
  }
  int threads = 32;
  while (threads < kMostThreads && threads * 4 < numbers) threads *= 2;  // tiles of 2 x 2
  return threads;
}

}  // namespace

Choice choose(const Description& network, int64_t tasks, bool is_double, const Wishes& wishes,
              int64_t shared_limit) {
  check_name("FASTMETA_FORM", wishes.form, "primal", "dual");
  check_name("FASTMETA_MEMORY", wishes.memory, "saved", "reversible");
  check_name("FASTMETA_CUDA_STORAGE", wishes.storage, "shared", "workspace");
  const int threads = wishes.threads;
  if (threads != 0 && (threads < 32 || threads > kMostThreads || (threads & (threads - 1)) != 0)) {
    throw std::invalid_argument("FASTMETA_CUDA_THREADS: " + std::to_string(threads) +
                                ", but it must be a power of two from 32 to " +
                                std::to_string(kMostThreads) + ", or unset");
  }
  std::vector<Choice> found;
  for (const bool dual : tries(wishes.form, "primal", "dual", can_be_dual(network),
                               is_better_dual(network))) {
    for (const bool reversible : tries(wishes.memory, "saved", "reversible",
                                       can_be_reversible(network), false)) {
      Choice choice{};
      choice.network = network;
      choice.network.dual = dual;
      choice.network.reversible = reversible;
      if (dual) choice.network.layers.front().in = 0;
      choice.layout = lay_out(choice.network, 1, is_double ? Rows::odd : Rows::fours);
      const int64_t number = is_double ? 8 : 4;
      choice.task_bytes = (choice.layout.size + kScratch) * number;
      choice.shape.threads = threads > 0 ? threads : block_threads(network);
      choice.shape.shared_bytes = choice.task_bytes;
      choice.serves = choice.task_bytes <= shared_limit && wishes.storage != "workspace";
      spread(choice, tasks, kMostBlocks);
      if (choice.serves) return choice;
      found.push_back(choice);
    }
  }
  Choice best = found.front();
  best.serves = wishes.storage == "workspace" ||
                (wishes.storage.empty() && widest(best.network) <= kWidest);
  spread(best, tasks, kMostInWorkspace);
  best.shape.shared_bytes = kScratch * (is_double ? 8 : 4);
  best.shape.workspace = best.shape.blocks * best.layout.size;
  return best;
}

}  // namespace fastmeta::cuda
