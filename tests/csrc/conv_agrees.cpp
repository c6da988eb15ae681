// The convolutional step of every instruction set gives what the plain one gives that counts number
// by number, and the same bits on any number of threads: `conv_agrees [COUNT]`.

#include <cstdio>
#include <cstdlib>

#include "conv_problem.h"

namespace fastmeta::tests {
namespace {

// Sums of at most 300 terms, a few blocks and steps.
constexpr double kTolerance[] = {1e-3, 1e-11};

const conv::Kernel<float>& kernel(const conv::Kernels& kernels, float) {
  return kernels.of_float;
}
const conv::Kernel<double>& kernel(const conv::Kernels& kernels, double) {
  return kernels.of_double;
}

template <class T>
bool agree(const ConvProblem& problem, const Results<double>& exact) {
  const bool wide = sizeof(T) == 8;
  const Inputs<T> in = inputs<T>(problem);
  bool good = true;
  for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
    const conv::Kernels kernels = conv::kernels(set.name);
    const conv::Kernel<T>& step = kernel(kernels, T());
    const Results<T> alone = run(step, problem, in, kAlone);
    // Where tasks share sums, they are added in another order.
    const Results<T> shared = run(step, problem, in, 1);
    bool same_bits = same(shared, run(step, problem, in, 3));
    if (problem.tasks <= 16) same_bits = same_bits && same(alone, shared);
    const bool compared = wide || !has_corners(problem.network);
    const double apart = compared ? std::max(distance(widened(alone), exact),
                                             distance(widened(shared), exact)) : 0;
    if (same_bits && apart <= kTolerance[wide]) continue;
    std::printf("number %d, %s, %s: %g apart from the plain one%s\n", int(problem.seed),
                std::string(set.name).c_str(), wide ? "double" : "float", apart,
                same_bits ? "" : ", other bits by threads");
    good = false;
  }
  return good;
}

}  // namespace
}  // namespace fastmeta::tests

int main(int count, char** arguments) {
  using namespace fastmeta::tests;
  const int problems = count > 1 ? std::atoi(arguments[1]) : 240;
  int wrong = 0;
  for (int number = 0; number < problems; ++number) {
    const ConvProblem problem = draw_conv(number);
    const fastmeta::conv::Kernels plain = fastmeta::conv::kernels("plain");
    const Results<double> exact =
        run(plain.of_double, problem, inputs<double>(problem), kAlone);
    wrong += !agree<float>(problem, exact) || !agree<double>(problem, exact);
  }
  std::printf("%d networks, %d wrong\n", problems, wrong);
  return wrong > 0;
}
