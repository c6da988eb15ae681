// Every engine of every instruction set gives what the plain one gives that runs all layers at
// every step, in primal and dual form, with weights saved and rebuilt, and the same bits on any
// number of threads: `engines_agree [COUNT]`.

#include <cstdio>
#include <cstdlib>

#include "drawing.h"

namespace fastmeta::tests {
namespace {

// Sums of at most 40 terms, a few layers and steps.
constexpr double kTolerance[] = {2e-4, 1e-11};

template <class T>
bool agree(const std::string& name, const cpu::Engine& engine, const Problem& problem,
           const Inputs<T>& in, const Results<double>& exact) {
  const bool wide = sizeof(T) == 8;
  bool good = true;
  const Results<T> alone = run(engine, problem, in, kAlone);
  for (int threads : {1, 3}) {
    if (same(alone, run(engine, problem, in, threads))) continue;
    std::printf("%s, %d threads: other bits than alone: %s\n", name.c_str(), threads,
                describe(problem).c_str());
    good = false;
  }
  if (!wide && has_corners(problem.network)) return good;
  const double apart = distance(widened(alone), exact);
  if (apart <= kTolerance[wide]) return good;
  std::printf("%s, %s: %g apart from the plain engine: %s\n", name.c_str(),
              wide ? "double" : "float", apart, describe(problem).c_str());
  return false;
}

// Few examples at a time, what they leave kept or computed again, in parts for threads.
template <class T>
bool agree_in_chunks(Problem problem, const Inputs<T>& in, const Results<double>& exact) {
  Description& network = problem.network;
  network.body = 0;
  bool good = true;
  for (const std::string rows : {"2", "3"}) {
    network.chunk = 0;
    cpu::cut(rows, "", network, problem.tasks, 1, 1);
    network.parts = rows == "2" ? 1 : 2;
    network.keeps_chunks = rows == "2" && sweeps(network);
    for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
      for (const cpu::Engine& engine : {set.tasks, set.features}) {
        const std::string name = std::string(set.name) + " over " + engine.name + ", in chunks";
        if (network.chunk > 0) good = agree(name, engine, problem, in, exact) && good;
        if (std::string(set.name) == "plain") break;  // it has one
      }
    }
  }
  return good;
}

template <class T>
bool agree(Problem problem) {
  const cpu::Engine plain = cpu::instruction_set("plain").tasks;
  const Results<double> exact = run(plain, problem, inputs<double>(problem), kAlone);
  const Inputs<T> in = inputs<T>(problem);
  connect(problem.network);
  bool good = agree_in_chunks<T>(problem, in, exact);
  const std::string forms[] = {"primal", "dual"}, memories[] = {"saved", "reversible"};
  for (int choice = 0; choice < 4; ++choice) {
    Description& network = problem.network;
    network.dual = cpu::dual(forms[choice / 2], network);
    network.reversible = cpu::reversible(memories[choice % 2], network, 0);
    // What was forced and can't serve has been run already.
    if (network.dual != (choice / 2 == 1) || network.reversible != (choice % 2 == 1)) continue;
    network.together = 2;  // the last ones are fewer where the number of tasks is odd
    for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
      for (const cpu::Engine& engine : {set.tasks, set.features}) {
        const std::string name = std::string(set.name) + " over " + engine.name;
        good = agree(name, engine, problem, in, exact) && good;
        if (std::string(set.name) == "plain") break;  // it has one
      }
    }
  }
  return good;
}

}  // namespace
}  // namespace fastmeta::tests

int main(int count, char** arguments) {
  using namespace fastmeta::tests;
  const int problems = count > 1 ? std::atoi(arguments[1]) : 960;
  int wrong = 0;
  for (int number = 0; number < problems; ++number) {
    const Problem problem = draw(number);
    wrong += !agree<float>(problem) || !agree<double>(problem);
  }
  std::printf("%d networks, %d wrong\n", problems, wrong);
  return wrong > 0;
}
