// The programs of expressions as Python classes.

#include "programs.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "described.h"
#include "expression.h"

namespace fastmeta {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

using InstructionTuple = std::tuple<int, int, int, int, int, double, double>;
using RegisterTuple = std::tuple<bool, int, int>;
using PortTuple = std::tuple<int, int, int, bool>;

Program program(const std::array<std::vector<InstructionTuple>, 3>& code,
                const std::vector<RegisterTuple>& registers, const std::vector<PortTuple>& inputs,
                const std::vector<PortTuple>& outputs, int slots) {
  Program made;
  std::vector<Instruction>* const parts[] = {&made.before, &made.each, &made.after};
  for (int i = 0; i < 3; ++i) {
    for (const auto& [op, out, a, b, c, p, q] : code[i]) {
      parts[i]->push_back({Op(op), out, a, b, c, p, q});
    }
  }
  for (const auto& [of_examples, columns, slot] : registers) {
    made.registers.push_back({of_examples, columns, slot});
  }
  for (const auto& [matrix, first, reg, adds] : inputs) {
    made.inputs.push_back({matrix, first, reg, adds});
  }
  for (const auto& [matrix, first, reg, adds] : outputs) {
    made.outputs.push_back({matrix, first, reg, adds});
  }
  made.slots = slots;
  return made;
}

// The operations in the order of their numbers.
std::vector<std::string> operations() {
#define FASTMETA_NAME(name, ...) #name,
  return {FASTMETA_UNARY(FASTMETA_NAME) FASTMETA_BINARY(FASTMETA_NAME)
              FASTMETA_TERNARY(FASTMETA_NAME) FASTMETA_OTHERS(FASTMETA_NAME)};
#undef FASTMETA_NAME
}

}  // namespace

void bind_programs(py::module_& module) {
  py::class_<Program, std::shared_ptr<Program>>(module, "Program")
      .def(py::init(&program), "code"_a, "registers"_a, "inputs"_a, "outputs"_a, "slots"_a);
  py::class_<LossPrograms, std::shared_ptr<LossPrograms>>(module, "LossPrograms")
      .def(py::init([](const Program& value, const Program& gradient, const Program& tangent,
                       const std::vector<std::tuple<bool, int, bool>>& inputs) {
             LossPrograms made{value, gradient, tangent, {}};
             if (inputs.size() > kMostLossInputs) throw std::invalid_argument("too many inputs");
             for (const auto& [of_examples, columns, learns] : inputs) {
               made.inputs.push_back({of_examples, columns, learns});
             }
             return made;
           }),
           "value"_a, "gradient"_a, "tangent"_a, "inputs"_a);
  py::class_<Programs>(module, "Programs")
      .def(py::init<>())
      .def(py::init([](const std::vector<std::shared_ptr<Program>>& layers,
                       const std::vector<std::shared_ptr<Program>>& short_layers,
                       std::shared_ptr<LossPrograms> loss, std::shared_ptr<LossPrograms> query) {
             return Programs{layers, short_layers, std::move(loss), std::move(query)};
           }),
           "layers"_a, "short_layers"_a, "loss"_a, "query_loss"_a);
  module.def("operations", &operations, "The operations of programs, in the order of their numbers.");
}

}  // namespace fastmeta
