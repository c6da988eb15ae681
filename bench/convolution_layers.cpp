// Times the four rules of each block of a convolutional network:
// `convolution_layers EXAMPLES SECONDS BLOCK...`, a block being "channels height width filters
// kernel[2] stride[2] padding[2] window[2] mean norm below". Prints layer, rule, milliseconds and
// multiply-adds of direct convolutions.

#if defined(__AVX512F__)
#define FASTMETA_NAMESPACE avx512
#define FASTMETA_BYTES 64
#define FASTMETA_CONV_ROWS 14
#elif defined(__AVX2__)
#define FASTMETA_NAMESPACE avx2
#define FASTMETA_BYTES 32
#define FASTMETA_CONV_ROWS 6
#else
#define FASTMETA_NAMESPACE baseline
#define FASTMETA_BYTES 16
#define FASTMETA_CONV_ROWS 6
#endif

#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <vector>

#include "cpu/arena.h"
#include "cpu/conv/block.h"
#include "cpu/conv/first_block.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {
namespace {

using Number = float;
enum Rule { kForward, kBackward, kTangentForward, kTangentBackward, kRules };
constexpr const char* kNames[] = {"forward", "backward", "tangent forward", "tangent backward"};
// Convolutions in each, of a block and of the one that reads the data.
constexpr int kConvolutions[2][kRules] = {{1, 2, 2, 4}, {1, 1, 1, 1}};

fastmeta::conv::Block read_block(const char* text) {
  fastmeta::conv::Block b{};
  std::istringstream in(text);
  bool norm;
  in >> b.channels >> b.height >> b.width >> b.filters;
  for (int* pair : {b.kernel, b.stride, b.padding, b.window}) in >> pair[0] >> pair[1];
  in >> b.mean >> norm >> b.below;
  b.dilation[0] = b.dilation[1] = 1;
  b.norm = norm ? Norm::batch : Norm::none, b.eps = 1e-5;
  for (int i : {kWeight, kScale, kShift}) b.has[i] = b.adapts[i] = i == kWeight || norm;
  return b;
}

double now() {  // of this thread's own time, ms
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return 1e3 * double(time.tv_sec) + 1e-6 * double(time.tv_nsec);
}

class Bench {
 public:
  Bench(const Network& network, double ms)
      : n(network), layout(fastmeta::conv::lay_out(network, lanes<Number>)), ms(ms) {
    numbers = static_cast<Number*>(arena.at_least(layout.size * sizeof(Number)));
    std::mt19937 random(0);
    std::normal_distribution<Number> normal;
    for (int64_t i = 0; i < layout.size; ++i) numbers[i] = Number(0.05) * normal(random);
    std::fill_n(numbers + layout.one, layout.zero - layout.one, Number(1));
    std::fill_n(numbers + layout.zero, layout.zero - layout.one, Number(0));
    if (by_patches(0)) first().measure(read(0).value, n.support, layout.support_measured);
  }
  void run() {
    const int depth = int(n.blocks.size());
    for (int l = 0; l < depth; ++l) {
      std::vector<double> times[kRules];
      for (const double end = now() + ms / depth; now() < end || times[0].size() < 5;) {
        for (int rule = 0; rule < kRules; ++rule) {
          const double start = now();
          call(l, Rule(rule));
          times[rule].push_back(now() - start);
        }
      }
      const Shape& s = layout.shapes[l];
      const int64_t one = int64_t(n.support) * s.pixels() * s.forward.taps.size() *
                          n.blocks[l].channels * n.blocks[l].filters;
      for (int rule = 0; rule < kRules; ++rule) {
        std::sort(times[rule].begin(), times[rule].end());
        std::printf("%d,%s,%.6f,%lld\n", l, kNames[rule], times[rule][times[rule].size() / 2],
                    (long long)(one * kConvolutions[l == 0][rule]));
      }
    }
  }

 private:
  const Network& n;
  const Layout layout;
  const double ms;
  cpu::Arena arena;
  Number* numbers;

  bool by_patches(int l) const { return l == layout.patched; }
  Block<Number> block(int l) const {
    return {n.blocks[l], layout.shapes[l], layout, n.support, numbers, numbers};
  }
  FirstBlock<Number> first() const {
    return {n.blocks[0], layout.shapes[0], layout, numbers, numbers};
  }
  // Of the block before it, and where derivatives by that go; or of the data.
  Read<Number> read(int l) const {
    if (l == 0) return {numbers + layout.support_x};
    return {numbers + layout.support[l - 1].output, numbers + layout.moving[l - 1].output,
            numbers + layout.support[l - 1].output_delta};
  }
  Tensors<Number> tensors(int l, int64_t from, int64_t scale) const {
    const Number* const at = numbers + from;
    const auto of = [&](Tensor i, int64_t none) {
      return n.blocks[l].has[i] ? at + layout.shapes[l].of[i] : numbers + none;
    };
    return {{of(kWeight, 0), nullptr, of(kScale, scale), of(kShift, layout.zero)}};
  }
  void call(int l, Rule rule) const {
    const Kept& kept = layout.support[l];
    const Moving& r = layout.moving[l];
    const int examples = n.support;
    const Tensors<Number> at = tensors(l, layout.weights, layout.one);
    const Tensors<Number> v = tensors(l, layout.vector, layout.zero);
    Number *const gradient = numbers + layout.gradient, *const lambda = numbers + layout.lambda;
    Read<Number> x = read(l);
    if (by_patches(l)) {
      if (rule == kForward) return first().forward(x.value, kept, at, examples);
      if (rule == kBackward) return first().backward(x.value, kept, at, examples, gradient);
      if (rule == kTangentForward) {
        return first().tangent_forward(x.value, kept, r, at, v, examples);
      }
      return first().tangent_backward(x.value, kept, r, at, v, examples, lambda);
    }
    const int64_t result = l > 0 ? kept.product_delta : layout.product_delta;
    if (rule == kForward) return block(l).forward(x, {}, kept, at);
    if (rule == kBackward) return block(l).backward(x, {}, kept, at, result, gradient);
    if (rule == kTangentForward) return block(l).tangent_forward(x, {}, kept, r, at, v);
    if (l > 0) x.delta = numbers + layout.moving[l - 1].output_delta;
    block(l).tangent_backward(x, {}, kept, r, at, v, lambda);
  }
};

}  // namespace
}  // namespace fastmeta::FASTMETA_NAMESPACE::conv

int main(int count, char** arguments) {
  using namespace fastmeta::FASTMETA_NAMESPACE::conv;
  if (count < 4) return 2;
  fastmeta::conv::Network network{};
  for (int i = 3; i < count; ++i) {
    network.blocks.push_back(read_block(arguments[i]));
    network.blocks.back().from = i - 4;  // the one before it, or the data
  }
  network.loss = {fastmeta::LossKind::mse, 0, 0, false};
  network.support = std::atoi(arguments[1]), network.steps = 1, network.differentiate = true;
  Bench(network, 1e3 * std::atof(arguments[2])).run();
}
