// Programs of expressions, written by hand: an activation, and a loss with a scale that is learned.
#pragma once

#include <deque>

#include "expression.h"
#include "network.h"

namespace fastmeta::tests {

// z s with s = sigmoid(1.7 z): the first of value, slope and curvature.
inline Program steep(int count) {
  Program program;
  program.each = {
      {Op::multiply_number, 1, 0, 0, 0, 1.7, 0},  // 1.7 z
      {Op::sigmoid, 2, 1, 0, 0, 0, 0},            // s
      {Op::multiply, 3, 0, 2, 0, 0, 0},           // z s
  };
  if (count > 1) {
    program.each.insert(program.each.end(), {
      {Op::affine, 4, 2, 0, 0, -1, 1},            // 1 - s
      {Op::multiply, 5, 2, 4, 0, 0, 0},           // d = s (1 - s)
      {Op::multiply_number, 6, 5, 0, 0, 1.7, 0},
      {Op::multiply_add, 7, 0, 6, 2, 0, 0},       // s + 1.7 z d
    });
  }
  program.outputs = {{1, 0, 3, false}};
  if (count > 1) program.outputs.push_back({2, 0, 7, false});
  if (count > 2) {
    program.each.push_back({Op::multiply_number, 8, 5, 0, 0, 3.4, 0});
    program.each.push_back({Op::affine, 9, 2, 0, 0, -3.4, 1.7});
    program.each.push_back({Op::multiply, 10, 6, 9, 0, 0, 0});  // 1.7^2 d (1 - 2 s)
    program.each.push_back({Op::multiply_add, 11, 0, 10, 8, 0, 0});
    program.outputs.push_back({3, 0, 11, false});
  }
  for (int i = 0; i < 4 * count; ++i) program.registers.push_back({true, 1, i});
  program.inputs = {{0, 0, 0, false}};
  program.slots = int(program.registers.size());
  return program;
}

// sum_n w_n sum_c s_c (z - y)^2, y being its first input and s, which it learns, its second.
inline LossPrograms scaled_squares(int columns, bool is_query) {
  enum { kZ, kWeights, kY, kScale, kError, kSquare, kScales, kScaled, kEach, kWeighed, kTotal,
         kSpread, kTwice, kGradient, kPart, kLearned, kR, kRegisters };
  Program base;
  for (int i = 0; i < kRegisters; ++i) base.registers.push_back({true, columns, i});
  for (int i : {kWeights, kEach, kWeighed}) base.registers[i].columns = 1;
  for (int i : {kScale, kTotal, kLearned}) base.registers[i].of_examples = false;
  base.registers[kTotal].columns = 1;
  base.slots = kRegisters;
  base.inputs = {{kPrediction, 0, kZ, false}, {kExampleWeights, 0, kWeights, false},
                 {kLossInputs, 0, kY, false}, {kLossInputs + 2, 0, kScale, false}};
  base.before = {{Op::spread, kScales, kScale, 0, 0, 0, 0}};
  base.each = {{Op::subtract, kError, kZ, kY, 0, 0, 0},
               {Op::multiply, kSquare, kError, kError, 0, 0, 0},
               {Op::spread, kSpread, kWeights, 0, 0, 0, 0}};
  LossPrograms made{base, base, base, {{true, columns, false}, {false, columns, true}}};
  const std::vector<Instruction> value = {
      {Op::multiply, kScaled, kSquare, kScales, 0, 0, 0},
      columns > 1 ? Instruction{Op::sum_columns, kEach, kScaled, 0, 0, 0, 0}
                  : Instruction{Op::copy, kEach, kScaled, 0, 0, 0, 0},
      {Op::multiply, kWeighed, kEach, kWeights, 0, 0, 0},
      {Op::sum_rows, kTotal, kWeighed, 0, 0, 0, 0}};
  for (Program* program : {&made.value, &made.gradient}) {
    program->each.insert(program->each.end(), value.begin(), value.end());
    program->outputs = {{kLossValue, 0, kTotal, false}};
  }
  const auto add = [](Program& program, std::initializer_list<Instruction> code) {
    program.each.insert(program.each.end(), code);
  };
  add(made.gradient, {{Op::multiply, kTwice, kError, kScales, 0, 0, 0},
                      {Op::multiply_number, kTwice, kTwice, 0, 0, 2, 0},
                      {Op::multiply, kGradient, kTwice, kSpread, 0, 0, 0},
                      {Op::multiply, kPart, kSquare, kSpread, 0, 0, 0}});
  if (is_query) add(made.gradient, {{Op::sum_rows, kLearned, kPart, 0, 0, 0, 0}});
  made.gradient.outputs.push_back({kResult, 0, kGradient, false});
  if (is_query) made.gradient.outputs.push_back({kLossInputs + 3, 0, kLearned, false});
  made.tangent.inputs.push_back({kDirection, 0, kR, false});
  add(made.tangent, {{Op::multiply, kTwice, kR, kScales, 0, 0, 0},
                     {Op::multiply_number, kTwice, kTwice, 0, 0, 2, 0},
                     {Op::multiply, kGradient, kTwice, kSpread, 0, 0, 0},
                     {Op::multiply, kPart, kError, kR, 0, 0, 0},
                     {Op::multiply_number, kPart, kPart, 0, 0, 2, 0},
                     {Op::multiply, kPart, kPart, kSpread, 0, 0, 0},
                     {Op::sum_rows, kLearned, kPart, 0, 0, 0, 0}});
  made.tangent.outputs = {{kResult, 0, kGradient, false}, {kLossInputs + 3, 0, kLearned, false}};
  return made;
}

// Puts programs in the place of smooth activations and of mean squares; they live for ever.
inline void give_programs(Description& network) {
  static std::deque<LossPrograms> losses;
  static const Program whole = steep(3), brief = steep(2);
  for (Dense& layer : network.layers) {
    if (layer.activation < Activation::silu) continue;
    layer.activation = Activation::expression;
    layer.program = &whole, layer.short_program = &brief;
  }
  const int columns = network.layers.back().out;
  for (Loss* loss : {&network.loss, &network.query_loss}) {
    if (loss->kind != LossKind::mse) continue;
    losses.push_back(scaled_squares(columns, loss == &network.query_loss));
    loss->kind = LossKind::expression;
    loss->programs = &losses.back();
  }
}

}  // namespace fastmeta::tests
