// The workload W1b, an MLP 1-40-40-1 and 25 tasks, so many times, with so many inner steps:
// `w1b SET ENGINE COUNT STEPS BODY`. With a BODY, only the layer after so many adapts.

#include <cstdio>
#include <cstdlib>

#include "problem.h"

int main(int count, char** arguments) {
  using namespace fastmeta;
  using namespace fastmeta::tests;
  if (count != 6) return 2;
  const int repeats = std::atoi(arguments[3]), steps = std::atoi(arguments[4]);
  const int body = std::atoi(arguments[5]), last = body > 0 ? body : 2;
  Problem problem{};
  for (int l = 0; l <= last; ++l) {
    const Activation activation = l == last ? Activation::identity : Activation::relu;
    problem.network.layers.push_back({l == 0 ? 1 : 40, l == last ? 1 : 40, activation, 0, 0,
                                      Norm::none, 0, {true, true}, {l >= body, l >= body}});
    problem.network.layers.back().from = l - 1;
  }
  problem.network.loss = problem.network.query_loss = {LossKind::mse, 0, 0, false};
  problem.network.support = problem.network.query = 10;
  problem.network.steps = steps;
  problem.network.differentiate = true;
  problem.tasks = 25;
  problem.step_weights.assign(steps + 1, 0);
  problem.evaluates.assign(steps + 1, 0);
  problem.step_weights.back() = problem.evaluates.back() = 1;
  problem.seed = 1;
  connect(problem.network);
  problem.network.dual = cpu::dual("", problem.network);
  const Inputs<float> in = inputs<float>(problem);
  const cpu::Engine engine =
      cpu::choose_engine(cpu::instruction_set(arguments[1]), arguments[2], problem.network,
                         problem.tasks, false).engine;
  for (int i = 0; i < repeats; ++i) {
    const Results<float> out = run(engine, problem, in, 1);
    if (std::isnan(out.gradient.front())) return 1;
  }
}
