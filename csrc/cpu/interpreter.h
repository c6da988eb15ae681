// Runs the program of an expression over a set's examples, a block of them at a time.
//
// A register is an array as long as a block, so that one look at an instruction serves some 64
// vectors. An element of a matrix is a vector where the lanes are tasks, else a scalar.
#pragma once

#include <cstdint>

#include "../expression.h"
#include "../network.h"
#include "gamma.h"
#include "of_all.h"
#include "program_memory.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// The elementwise instructions, on `count` vectors.
template <class S, class Num>
__attribute__((noinline)) void compute(const Instruction& at, Num* const* registers, int64_t count) {
  Num* const out = registers[at.out];
  const Num *const of_a = registers[at.a], *const of_b = registers[at.b],
                   *const of_c = registers[at.c];
  const S p = S(at.p), q = S(at.q);
  switch (at.op) {
#define FASTMETA_CASE(name, ...)                                  \
  case Op::name:                                                  \
    for (int64_t i = 0; i < count; ++i) out[i] = __VA_ARGS__;     \
    return;
#define FASTMETA_UNARY_CASE(name, ...)        \
  case Op::name:                              \
    for (int64_t i = 0; i < count; ++i) {     \
      const Num a = of_a[i];                  \
      out[i] = __VA_ARGS__;                   \
    }                                         \
    return;
#define FASTMETA_BINARY_CASE(name, ...)           \
  case Op::name:                                  \
    for (int64_t i = 0; i < count; ++i) {         \
      const Num a = of_a[i], b = of_b[i];         \
      out[i] = __VA_ARGS__;                       \
    }                                             \
    return;
#define FASTMETA_TERNARY_CASE(name, ...)                    \
  case Op::name:                                            \
    for (int64_t i = 0; i < count; ++i) {                   \
      const Num a = of_a[i], b = of_b[i], c = of_c[i];      \
      out[i] = __VA_ARGS__;                                 \
    }                                                       \
    return;
    FASTMETA_UNARY(FASTMETA_UNARY_CASE)
    FASTMETA_BINARY(FASTMETA_BINARY_CASE)
    FASTMETA_TERNARY(FASTMETA_TERNARY_CASE)
    FASTMETA_CASE(fill, p - Num{})
    FASTMETA_CASE(add_number, of_a[i] + p)
    FASTMETA_CASE(multiply_number, of_a[i] * p)
    FASTMETA_CASE(affine, of_a[i] * p + q)
    FASTMETA_CASE(number_over, p / of_a[i])
    FASTMETA_CASE(multiply_add, of_a[i] * of_b[i] + of_c[i])
    FASTMETA_CASE(multiply_subtract, of_a[i] * of_b[i] - of_c[i])
    FASTMETA_CASE(subtract_product, of_c[i] - of_a[i] * of_b[i])
    FASTMETA_CASE(copy, of_a[i])
#undef FASTMETA_CASE
#undef FASTMETA_UNARY_CASE
#undef FASTMETA_BINARY_CASE
#undef FASTMETA_TERNARY_CASE
    case Op::sine_cosine:
      for (int64_t i = 0; i < count; ++i) {
        Num sine, cosine;
        sine_and_cosine(of_a[i], sine, cosine);
        out[i] = sine, registers[at.c][i] = cosine;
      }
      return;
    case Op::softplus_sigmoid:
      for (int64_t i = 0; i < count; ++i) {
        Num softplus, sigmoid;
        softplus_and_sigmoid<S>(of_a[i], softplus, sigmoid);
        out[i] = softplus, registers[at.c][i] = sigmoid;
      }
      return;
    case Op::tanh_softplus_sigmoid:
      for (int64_t i = 0; i < count; ++i) {
        Num value, sigmoid;
        tanh_softplus_and_sigmoid<S>(of_a[i], value, sigmoid);
        out[i] = value, registers[at.c][i] = sigmoid;
      }
      return;
    default: return;
  }
}

// A register of the examples of a block holds [examples, columns] where an element is a vector, as
// matrices do; else column by column [columns, examples padded to whole vectors], so that sums along
// the columns are of vectors, and few columns waste no lanes.
template <class S, class Num, class Element>
class Interpreter {
 public:
  static constexpr int width = sizeof(Num) / sizeof(Element);

  Interpreter(const Program& program, Element* storage, int examples)
      : program_(program), storage_(storage), examples_(examples) {
    int widest = 1;
    for (const Register& r : program.registers) {
      if (r.of_examples && r.columns > widest) widest = r.columns;
    }
    const int most = kBlock / widest > 0 ? kBlock / widest : 1;  // vectors of examples
    rows_ = most * width < examples ? most * width : examples;
    padded_ = (rows_ + width - 1) / width * width;
    int64_t slot = 1;
    for (const Register& r : program.registers) {
      const int64_t size = int64_t(r.of_examples ? padded_ : 1) * r.columns;
      if (size > slot) slot = size;
    }
    slot = (slot + width - 1) / width * width;
    const std::size_t count = program.registers.size();
    const std::size_t bytes = (program.slots * slot * sizeof(Element) + 63) / 64 * 64;
    char* const memory =
        static_cast<char*>(cpu::program_memory(bytes + count * sizeof(Element*)));
    registers_ = reinterpret_cast<Element**>(memory + bytes);
    for (std::size_t i = 0; i < count; ++i) {
      registers_[i] = reinterpret_cast<Element*>(memory) + program.registers[i].slot * slot;
    }
  }

  // Reads and writes the caller's matrices, each by its number.
  void run(const View* matrices) {
    for (const Port& port : program_.inputs) {
      if (!reg(port).of_examples) read(port, matrices[port.matrix], 0, 1);
    }
    for (const Instruction& at : program_.each) {
      if (at.op == Op::sum_rows) clear(at.out);
    }
    run(program_.before, rows_);
    for (int first = 0; first < examples_; first += rows_) {
      const int rows = examples_ - first < rows_ ? examples_ - first : rows_;
      for (const Port& port : program_.inputs) {
        if (reg(port).of_examples) read(port, matrices[port.matrix], first, rows);
      }
      run(program_.each, rows);
      for (const Port& port : program_.outputs) {
        if (reg(port).of_examples) write(port, matrices[port.matrix], first, rows);
      }
    }
    run(program_.after, rows_);
    for (const Port& port : program_.outputs) {
      if (!reg(port).of_examples) write(port, matrices[port.matrix], 0, 1);
    }
  }

 private:
  static constexpr int kBlock = 64;  // vectors

  const Program& program_;
  Element* const storage_;
  const int examples_;
  int rows_, padded_;  // of a block
  Element** registers_;

  const Register& reg(const Port& port) const { return program_.registers[port.reg]; }
  // How far apart an example's values, and a column's, lie from the next one's.
  int64_t row_stride(const Register& r) const { return width == 1 ? r.columns : 1; }
  int64_t col_stride(const Register& r) const { return width == 1 || !r.of_examples ? 1 : padded_; }

  // Vectors of a register; a block that is not full leaves some of a column's out.
  int64_t vectors_of(const Register& r, int rows) const {
    if (!r.of_examples) return (r.columns + width - 1) / width;
    if (width == 1) return int64_t(rows) * r.columns;
    return r.columns == 1 ? (rows + width - 1) / width : int64_t(padded_ / width) * r.columns;
  }

  bool lies_so(const Register& r, View v, int first) const {
    if (r.columns == 1) return v.cols == 1 && (v.row_stride == 1 || !r.of_examples);
    return first == 0 && v.cols == r.columns && v.col_stride == 1 &&
           (!r.of_examples || (width == 1 && v.row_stride == r.columns));
  }

  void read(const Port& port, View v, int first, int rows) {
    const Register& r = reg(port);
    Element* const from = storage_ + v.offset + int64_t(first) * v.row_stride;
    if (lies_so(r, v, port.first)) {
      registers_[port.reg] = from;
      return;
    }
    Element* const to = registers_[port.reg];
    const int64_t row = row_stride(r), col = col_stride(r);
    for (int j = 0; j < r.columns; ++j) {
      const Element* const column = from + (port.first + j) * v.col_stride;
      for (int i = 0; i < rows; ++i) to[i * row + j * col] = column[i * v.row_stride];
    }
  }

  void write(const Port& port, View v, int first, int rows) {
    const Register& r = reg(port);
    const Element* const from = registers_[port.reg];
    Element* const to = storage_ + v.offset + int64_t(first) * v.row_stride;
    if (!port.adds && lies_so(r, v, port.first)) {
      const int64_t count = vectors_of(r, rows);
      for (int64_t i = 0; i < count; ++i) vectors(to)[i] = vectors(from)[i];
      return;
    }
    const int64_t row = row_stride(r), col = col_stride(r);
    for (int j = 0; j < r.columns; ++j) {
      Element* const column = to + (port.first + j) * v.col_stride;
      for (int i = 0; i < rows; ++i) {
        const Element value = from[i * row + j * col];
        Element& out = column[i * v.row_stride];
        out = port.adds ? out + value : value;
      }
    }
  }

  void clear(int number) {
    for (int j = 0; j < program_.registers[number].columns; ++j) registers_[number][j] = Element{};
  }

  void run(const std::vector<Instruction>& code, int rows) {
    for (const Instruction& at : code) {
      switch (at.op) {
        case Op::spread: spread(at, rows); break;
        case Op::index:
          for (int j = 0; j < of(at.out).columns; ++j) registers_[at.out][j] = Element{} + S(j);
          break;
        case Op::count: registers_[at.out][0] = Element{} + S(examples_); break;
        case Op::sum_columns: fold(at, rows, Num{}, [](auto& sum, auto x) { sum += x; }); break;
        case Op::max_columns:
          fold(at, rows, Num{} - S(1) / S(0), [](auto& most, auto x) {
            most = select(x == x, select(most < x, x, most), x);
          });
          break;
        case Op::sum_rows: sum_rows(at, rows); break;
        default:
          compute<S>(at, reinterpret_cast<Num* const*>(registers_), vectors_of(of(at.out), rows));
      }
    }
  }

  const Register& of(int number) const { return program_.registers[number]; }

  void spread(const Instruction& at, int rows) {
    const Register &from = of(at.a), &to = of(at.out);
    const Element* const in = registers_[at.a];
    Element* const out = registers_[at.out];
    const int64_t row = row_stride(from), col = from.columns > 1 ? col_stride(from) : 0;
    if (!to.of_examples) {
      for (int j = 0; j < to.columns; ++j) out[j] = in[0];
    } else if (width == 1) {
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < to.columns; ++j) {
          out[i * to.columns + j] = in[(from.of_examples ? i * row : 0) + j * col];
        }
      }
    } else {
      for (int j = 0; j < to.columns; ++j) {
        Num* const column = vectors(out + j * padded_);
        const Num every = in[from.columns > 1 && !from.of_examples ? j : 0] - Num{};  // keeps -0
        const Num* const given = vectors(in + j * col);
        for (int64_t i = 0; i < padded_ / width; ++i) column[i] = from.of_examples ? given[i] : every;
      }
    }
  }

  // f(result, value) along each example's columns, or along those that all examples share.
  template <class F>
  void fold(const Instruction& at, int rows, Num start, F f) {
    const Register& from = of(at.a);
    const Element* const in = registers_[at.a];
    Element* const out = registers_[at.out];
    if (!from.of_examples) {
      Element result = first_of(start);
      for (int j = 0; j < from.columns; ++j) f(result, in[j]);
      out[0] = result;
      return;
    }
    const int64_t row = width == 1 ? from.columns : 1, col = width == 1 ? 1 : padded_ / width;
    const int64_t count = width == 1 ? rows : (rows + width - 1) / width;
    for (int64_t i = 0; i < count; ++i) {
      Num result = start;
      for (int j = 0; j < from.columns; ++j) f(result, vectors(in)[i * row + j * col]);
      vectors(out)[i] = result;
    }
  }

  void sum_rows(const Instruction& at, int rows) {
    const Register& from = of(at.a);
    const int64_t row = row_stride(from), col = col_stride(from);
    for (int j = 0; j < from.columns; ++j) {
      const Element* const in = registers_[at.a] + j * col;
      Element sum{};
      for (int i = 0; i < rows; ++i) sum += in[i * row];
      registers_[at.out][j] += sum;
    }
  }

  static Element first_of(Num value) {
    Element first;
    __builtin_memcpy(&first, &value, sizeof first);
    return first;
  }
  static Num* vectors(Element* at) { return reinterpret_cast<Num*>(at); }
  static const Num* vectors(const Element* at) { return reinterpret_cast<const Num*>(at); }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
