// Expressions of each number of what a block holds, by the interpreter.
#pragma once

#include "tensors.h"
#include "vectors.h"

#include "../interpreter.h"  // which looks for the functions of the vectors above

namespace fastmeta::FASTMETA_NAMESPACE::conv {

// Runs a program over `size` numbers, whole vectors of channels: matrix i begins at offsets[i], and
// the first is its argument. Channels from `filters` on stay zero, whatever f(0) is.
template <class T, std::size_t count>
void express(const Program& program, T* workspace, const int64_t (&offsets)[count], int64_t size,
             const Shape& shape, int filters) {
  constexpr int64_t kAtOnce = 1 << 16;  // between two looks at the budget
  for (int64_t first = 0; first < size; first += kAtOnce) {
    const int numbers = int(size - first < kAtOnce ? size - first : kAtOnce);
    View matrices[count];
    for (std::size_t i = 0; i < count; ++i) matrices[i] = {offsets[i] + first, numbers, 1, 1, 1};
    Interpreter<T, Num<T>, T>(program, workspace, numbers).run(matrices);
    spend(cpu::budget(), int64_t(program.each.size()) * numbers / lanes<T>);
  }
  if (filters == shape.out) return;
  for (const Port& port : program.outputs) {
    T* const to = workspace + offsets[port.matrix];
    for (int64_t p = 0; p < size; p += shape.out) {
      for (int c = filters; c < shape.out; ++c) to[p + c] = T(0);
    }
  }
}

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
