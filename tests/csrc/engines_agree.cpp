// Every engine gives what the plain one gives, over drawn networks, and the same bits by any number
// of threads: `engines_agree [COUNT]`.

#include <cstdio>
#include <cstdlib>

#include "drawing.h"

namespace fastmeta::tests {
namespace {

// Sums of at most 40 terms, a few layers and steps.
constexpr double kTolerance[] = {2e-4, 1e-11};

template <class T>
bool agree(const Problem& problem) {
  const Inputs<T> in = inputs<T>(problem);
  const Results<double> exact =
      run(cpu::instruction_set("plain"), problem, inputs<double>(problem), kAlone);
  const bool wide = sizeof(T) == 8;
  bool good = true;
  for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
    const Results<T> alone = run(set, problem, in, kAlone);
    for (int threads : {1, 3}) {
      if (same(alone, run(set, problem, in, threads))) continue;
      std::printf("%s, %d threads: other bits than alone: %s\n", set.name, threads,
                  describe(problem).c_str());
      good = false;
    }
    if (!wide && has_corners(problem.network)) continue;
    const double apart = distance(widened(alone), exact);
    if (!(apart <= kTolerance[wide])) {
      std::printf("%s, %s: %g apart from the plain engine: %s\n", set.name,
                  wide ? "double" : "float", apart, describe(problem).c_str());
      good = false;
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
