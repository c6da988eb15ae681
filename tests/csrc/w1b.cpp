// The workload W1b, an MLP 1-40-40-1 with K = 5 and 25 tasks, so many times: `w1b SET ENGINE COUNT`.

#include <cstdio>
#include <cstdlib>

#include "problem.h"

int main(int count, char** arguments) {
  using namespace fastmeta;
  using namespace fastmeta::tests;
  if (count != 4) return 2;
  Problem problem{};
  for (auto [in, out] : {std::pair(1, 40), std::pair(40, 40), std::pair(40, 1)}) {
    const Activation activation = out == 1 ? Activation::identity : Activation::relu;
    problem.network.layers.push_back(
        {in, out, activation, 0, 0, Norm::none, 0, {true, true}, {true, true}});
  }
  problem.network.loss = {LossKind::mse, 0, 0, false};
  problem.network.support = problem.network.query = 10;
  problem.network.steps = 5;
  problem.network.differentiate = true;
  problem.tasks = 25;
  problem.step_weights = {0, 0, 0, 0, 0, 1};
  problem.evaluates = {0, 0, 0, 0, 0, 1};
  problem.seed = 1;
  problem.network.dual = cpu::dual("", problem.network);
  const Inputs<float> in = inputs<float>(problem);
  const cpu::Engine engine =
      cpu::choose_engine(cpu::instruction_set(arguments[1]), arguments[2], problem.network,
                         problem.tasks, false).engine;
  for (int i = std::atoi(arguments[3]); i > 0; --i) {
    const Results<float> out = run(engine, problem, in, 1);
    if (std::isnan(out.gradient.front())) return 1;
  }
}
