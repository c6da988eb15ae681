// An expression as a program: what fastmeta/network/expressions/program.py compiles it to.
#pragma once

#include <cstdint>
#include <vector>

#include "operations.h"

namespace fastmeta {

// Those that no table has: `fill` gives p, `add_number` a + p, `multiply_number` a p, `affine`
// a p + q, `number_over` p / a, `multiply_add` a b + c, `multiply_subtract` a b - c,
// `subtract_product` c - a b, `sine_cosine` sin a and, to register c, cos a,
// `softplus_sigmoid` and `tanh_softplus_sigmoid` likewise; `spread` gives a for each example and column,
// `index` 0, 1, ... along the columns, `count` the number of examples; `sum_rows` adds to what is there.
#define FASTMETA_OTHERS(ONE)                                                                \
  ONE(fill) ONE(add_number) ONE(multiply_number) ONE(affine) ONE(number_over)               \
  ONE(multiply_add) ONE(multiply_subtract) ONE(subtract_product) ONE(sine_cosine)           \
  ONE(softplus_sigmoid) ONE(tanh_softplus_sigmoid) ONE(copy) ONE(spread) ONE(index)         \
  ONE(count) ONE(sum_columns) ONE(max_columns) ONE(sum_rows)

#define FASTMETA_NAME(name, ...) name,
enum class Op : uint8_t {
  FASTMETA_UNARY(FASTMETA_NAME) FASTMETA_BINARY(FASTMETA_NAME) FASTMETA_TERNARY(FASTMETA_NAME)
      FASTMETA_OTHERS(FASTMETA_NAME)
};
#undef FASTMETA_NAME

struct Instruction {
  Op op;
  int out, a, b, c;  // registers
  double p, q;
};

// A value of so many columns, of each example or of all. Registers that are never needed together
// share a slot.
struct Register {
  bool of_examples;
  int columns, slot;
};

// Where a register is read from or written to: some columns of one of the caller's matrices.
struct Port {
  int matrix, first, reg;
  bool adds;  // whether it is added to what is there
};

struct Program {
  std::vector<Instruction> before, each, after;  // once, for each block of examples, once more
  std::vector<Register> registers;
  std::vector<Port> inputs, outputs;
  int slots = 0;
};

// What a loss reads beside the prediction: a tensor of the targets, or one that all tasks share.
struct LossInput {
  bool of_examples;
  int columns;
  bool learns;  // whether it gets a gradient
};

// The matrices of a loss's programs by number. Input i is number `kLossInputs + 2 i`; the next is the
// gradient by it.
enum LossMatrix { kPrediction, kDirection, kExampleWeights, kLossValue, kResult, kLossInputs };

// A loss [1, 1] by itself; with its gradient by the prediction [N, C] (of a query set also by what
// learns); and the gradient's tangent along the prediction's (of a support set also of that by what
// learns).
constexpr int kMostLossInputs = 8;
struct LossPrograms {
  Program value, gradient, tangent;
  std::vector<LossInput> inputs;
};

}  // namespace fastmeta
