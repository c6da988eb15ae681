// Runs the program of an expression over a set's examples, a block of them at a time.
//
// A register is an array as long as a block, so that one look at an instruction serves some 64
// vectors. An element of a matrix is a vector where the lanes are tasks, else a scalar; there rows are
// padded to whole vectors, and what stands in the padding reaches no sum.
#pragma once

#include <cmath>
#include <cstdint>

#include "../expression.h"
#include "../network.h"
#include "arena.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// log, log1p and expm1 over all numbers: those of math.h are narrower.
template <class S, class Num>
Num log_of_all(Num x) {
  const S smallest = sizeof(S) == 8 ? S(0x1p-1022) : S(0x1p-126);
  const S up = sizeof(S) == 8 ? S(0x1p54) : S(0x1p24), back = sizeof(S) == 8 ? S(54) : S(24);
  const auto denormal = x < smallest;
  const Num normal = log(select(denormal, x * up, x));
  const Num found = select(denormal, normal - back * S(0.69314718055994530942), normal);
  const S infinity = S(1) / S(0);
  return select(x > S(0), found, select(x == S(0), Num{} - infinity, x - x + S(0) / (x - x)));
}
template <class S, class Num>
Num log1p_of_all(Num u) {
  const Num w = u + S(1);
  const Num found = log(w) + (u - (w - S(1))) / w;
  return select(w > S(0), select(w - w == S(0), found, w), log_of_all<S>(w));
}
template <class S, class Num>
Num expm1_of_all(Num x) {
  const S most = sizeof(S) == 8 ? S(700) : S(80);
  return select(x > most, exp(x), expm1(select(x > most, Num{} + most, x)));
}
template <class S, class Num>
Num power_of_all(Num a, Num b) {
  constexpr int lanes = sizeof(Num) / sizeof(S);
  S x[lanes], y[lanes];
  __builtin_memcpy(x, &a, sizeof a);
  __builtin_memcpy(y, &b, sizeof b);
  for (int i = 0; i < lanes; ++i) x[i] = std::pow(x[i], y[i]);
  __builtin_memcpy(&a, x, sizeof a);
  return a;
}

// Whether sines and cosines of all these are within what `sine_and_cosine` takes.
template <class S, class Num>
bool are_angles(const Num* x, int64_t count) {
  constexpr int lanes = sizeof(Num) / sizeof(S);
  Num largest{};
  for (int64_t i = 0; i < count; ++i) largest = select(absolute(x[i]) <= largest, largest, absolute(x[i]));
  S parts[lanes];
  __builtin_memcpy(parts, &largest, sizeof parts);
  bool within = true;
  for (int i = 0; i < lanes; ++i) within = within && parts[i] <= kLargestAngle<Num>;
  return within;
}

// f of each lane.
template <class S, class Num, class F>
void by_lanes(Num* out, const Num* x, int64_t count, F f) {
  constexpr int lanes = sizeof(Num) / sizeof(S);
  for (int64_t i = 0; i < count; ++i) {
    S parts[lanes];
    __builtin_memcpy(parts, x + i, sizeof parts);
    for (int j = 0; j < lanes; ++j) parts[j] = f(parts[j]);
    __builtin_memcpy(out + i, parts, sizeof parts);
  }
}

// The elementwise instructions, on `count` vectors.
template <class S, class Num>
__attribute__((noinline)) void compute(const Instruction& at, Num* const* registers, int64_t count) {
  if ((at.op == Op::sine || at.op == Op::cosine || at.op == Op::sine_cosine) &&
      !are_angles<S>(registers[at.a], count)) {
    const auto sine = [](S x) { return std::sin(x); };
    const auto cosine = [](S x) { return std::cos(x); };
    if (at.op != Op::cosine) by_lanes<S>(registers[at.out], registers[at.a], count, sine);
    if (at.op == Op::sine) return;
    return by_lanes<S>(registers[at.op == Op::cosine ? at.out : at.c], registers[at.a], count, cosine);
  }
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
    FASTMETA_CASE(fill, Num{} + p)
    FASTMETA_CASE(add_number, of_a[i] + p)
    FASTMETA_CASE(multiply_number, of_a[i] * p)
    FASTMETA_CASE(affine, of_a[i] * p + q)
    FASTMETA_CASE(number_over, p / of_a[i])
    FASTMETA_CASE(multiply_add, of_a[i] * of_b[i] + of_c[i])
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
    default: return;
  }
}

inline cpu::Arena& program_memory() {
  static thread_local cpu::Arena arena;
  return arena;
}

template <class S, class Num, class Element>
class Interpreter {
 public:
  static constexpr int width = sizeof(Num) / sizeof(Element);

  Interpreter(const Program& program, Element* storage, int examples)
      : program_(program), storage_(storage), examples_(examples) {
    int64_t widest = 1;
    for (const Register& r : program.registers) {
      if (r.of_examples && stride(r.columns) > widest) widest = stride(r.columns);
    }
    // Whole vectors of examples, so that a block's columns begin at one.
    const int64_t most = (kBlock * width / widest + width - 1) / width * width;
    rows_ = int(most < examples ? (most > 0 ? most : width) : examples);
    const int64_t whole = (rows_ + width - 1) / width * width;
    int64_t slot = 1;
    for (const Register& r : program.registers) {
      const int64_t size = (r.of_examples ? whole : 1) * stride(r.columns);
      if (size > slot) slot = size;
    }
    slot = (slot + width - 1) / width * width;
    const std::size_t count = program.registers.size();
    const std::size_t bytes = program.slots * slot * sizeof(Element);
    const std::size_t line = (bytes + 63) / 64 * 64;
    char* const memory =
        static_cast<char*>(program_memory().at_least(line + count * sizeof(Element*)));
    registers_ = reinterpret_cast<Element**>(memory + line);
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
  int rows_;  // of a block
  Element** registers_;

  // From one example's values to the next one's; the layout pads rows likewise.
  static int64_t stride(int columns) { return columns == 1 ? 1 : padded(columns, width); }

  const Register& reg(const Port& port) const { return program_.registers[port.reg]; }
  int64_t elements(const Register& r, int rows) const {
    return (r.of_examples ? rows : 1) * stride(r.columns);
  }

  bool lies_so(const Register& r, View v, int first) const {
    if (r.columns == 1) return v.cols == 1 && (v.row_stride == 1 || !r.of_examples);
    return first == 0 && v.cols == r.columns && v.col_stride == 1 &&
           (v.row_stride == stride(r.columns) || !r.of_examples);
  }

  void read(const Port& port, View v, int first, int rows) {
    const Register& r = reg(port);
    Element* const from = storage_ + v.offset + int64_t(first) * v.row_stride;
    if (lies_so(r, v, port.first)) {
      registers_[port.reg] = from;
      return;
    }
    Element* const to = registers_[port.reg];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < r.columns; ++j) {
        to[i * stride(r.columns) + j] = from[i * v.row_stride + (port.first + j) * v.col_stride];
      }
    }
  }

  void write(const Port& port, View v, int first, int rows) {
    const Register& r = reg(port);
    const Element* const from = registers_[port.reg];
    Element* const to = storage_ + v.offset + int64_t(first) * v.row_stride;
    if (!port.adds && width > 1 && lies_so(r, v, port.first)) {
      const int64_t count = (elements(r, rows) + width - 1) / width;
      for (int64_t i = 0; i < count; ++i) vectors(to)[i] = vectors(from)[i];
      return;
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < r.columns; ++j) {
        Element& out = to[i * v.row_stride + (port.first + j) * v.col_stride];
        const Element value = from[i * stride(r.columns) + j];
        out = port.adds ? out + value : value;
      }
    }
  }

  void clear(int number) {
    const int64_t count = stride(program_.registers[number].columns);
    for (int64_t i = 0; i < count; ++i) registers_[number][i] = Element{};
  }

  void run(const std::vector<Instruction>& code, int rows) {
    for (const Instruction& at : code) {
      switch (at.op) {
        case Op::spread: spread(at, rows); break;
        case Op::index: number(at); break;
        case Op::count: registers_[at.out][0] = Element{} + S(examples_); break;
        case Op::sum_columns: fold(at, rows, Element{}, [](auto& sum, auto x) { sum += x; }); break;
        case Op::max_columns:
          fold(at, rows, Element{} - S(1) / S(0), [](auto& most, auto x) {
            most = select(x == x, select(most < x, x, most), x);
          });
          break;
        case Op::sum_rows: sum_rows(at, rows); break;
        default: {
          const int64_t count = elements(program_.registers[at.out], rows);
          compute<S>(at, reinterpret_cast<Num* const*>(registers_), (count + width - 1) / width);
        }
      }
    }
  }

  void number(const Instruction& at) {
    const int columns = program_.registers[at.out].columns;
    for (int j = 0; j < columns; ++j) registers_[at.out][j] = Element{} + S(j);
  }

  void spread(const Instruction& at, int rows) {
    const Register &from = program_.registers[at.a], &to = program_.registers[at.out];
    const int64_t length = stride(to.columns);
    const int count = to.of_examples ? rows : 1;
    for (int i = 0; i < count; ++i) {
      const Element* const source =
          registers_[at.a] + (from.of_examples ? i * stride(from.columns) : 0);
      Element* const row = registers_[at.out] + i * length;
      if (from.columns > 1) {
        for (int64_t j = 0; j < length; j += width) vectors(row + j)[0] = vectors(source + j)[0];
      } else if (to.columns > 1) {
        const Num value = Num{} + source[0];
        for (int64_t j = 0; j < length; j += width) vectors(row + j)[0] = value;
      } else {
        row[0] = source[0];
      }
    }
  }

  // f(result, value) along each example's columns.
  template <class F>
  void fold(const Instruction& at, int rows, Element start, F f) {
    const Register& from = program_.registers[at.a];
    const int64_t length = stride(from.columns);
    const int count = from.of_examples ? rows : 1;
    for (int i = 0; i < count; ++i) {
      const Element* const row = registers_[at.a] + i * length;
      Element result = start;
      for (int j = 0; j < from.columns; ++j) f(result, row[j]);
      registers_[at.out][i] = result;
    }
  }

  void sum_rows(const Instruction& at, int rows) {
    const Register& from = program_.registers[at.a];
    Element* const sums = registers_[at.out];
    if (from.columns == 1) {
      for (int i = 0; i < rows; ++i) sums[0] += registers_[at.a][i];
      return;
    }
    const int64_t length = stride(from.columns);
    for (int i = 0; i < rows; ++i) {
      const Element* const row = registers_[at.a] + i * length;
      for (int64_t j = 0; j < length; j += width) vectors(sums + j)[0] += vectors(row + j)[0];
    }
  }

  static Num* vectors(Element* at) { return reinterpret_cast<Num*>(at); }
  static const Num* vectors(const Element* at) { return reinterpret_cast<const Num*>(at); }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
