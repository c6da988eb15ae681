// The open passes as a Python class: addresses and sizes in, everything checked in Python.

#include "open.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/pool.h"
#include "cpu/step.h"
#include "cpu/storage.h"
#include "described.h"
#include "open_call.h"
#include "signals.h"

namespace fastmeta {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

using Address = uintptr_t;
using Addresses = std::vector<Address>;

// What passes leave for later ones of the same tasks.
struct Traces {
  cpu::Storage storage;
  int64_t tasks;
  std::vector<double> ones;  // [T], as whatever number
};

class OpenPasses {
 public:
  OpenPasses(const std::vector<LayerTuple>& layers, int support, int query, int slots,
             bool first_order, bool inputs_flow, bool is_double, int64_t tasks,
             const std::string& instruction_set, const std::string& engine, const Programs& programs)
      : programs_(programs), set_(cpu::instruction_set(instruction_set)), is_double_(is_double) {
    const Loss none{LossKind::mse, 0, 0, false};
    network_ = described(layers, none, support, query, slots, true, first_order, false, false, 0, {});
    give(network_, programs_);
    open(network_, slots, first_order, inputs_flow);
    const cpu::Chosen chosen = cpu::choose_engine(set_, engine, network_, tasks, is_double);
    engine_ = chosen.engine, seconds_ = chosen.seconds;
    layout_ = lay_out(network_, is_double ? engine_.of_double.width : engine_.of_float.width);
  }

  int64_t parameters() const { return layout_.parameters; }
  int64_t storage_bytes(int64_t tasks) const {
    return (tasks + together() - 1) / together() *
           (is_double_ ? cpu::open_stride(engine_.of_double, layout_)
                       : cpu::open_stride(engine_.of_float, layout_));
  }
  int together() const { return is_double_ ? engine_.of_double.tasks : engine_.of_float.tasks; }
  std::string instruction_set() const { return set_.name; }
  std::string engine() const { return engine_.name; }
  double seconds() const { return seconds_; }

  std::unique_ptr<Traces> traces(int64_t tasks) const {
    std::vector<double> ones(tasks, 1.0);
    if (!is_double_) std::fill_n(reinterpret_cast<float*>(ones.data()), tasks, 1.0f);
    return std::unique_ptr<Traces>(new Traces{
        cpu::Storage(std::size_t(storage_bytes(tasks))), tasks, std::move(ones)});
  }

  // Parameters are [T, ...], or one for all tasks where the stride is 0; those of address 0 are
  // where an earlier pass found them.
  void forward(Traces& traces, int slot, Address x, const Addresses& parameters,
               const std::vector<int64_t>& strides, const Addresses& statistics, Address output,
               int threads) const {
    run(traces, x, slot, threads, [&](auto& data, auto& call, int64_t count) {
      call.pass = OpenPass::forward;
      set(data.parameters, parameters, strides);
      set(data.statistics, statistics, std::vector<int64_t>(statistics.size(), 0));
      set(call.output, output, count * network_.layers.back().out);
    });
  }

  // Gradients are asked for by their addresses; where the stride is 0 by any, and are summed over
  // tasks in `summed` [P].
  void backward(Traces& traces, int slot, Address x, Address flowing, const Addresses& gradients,
                const std::vector<int64_t>& strides, Address summed, Address of_input,
                bool of_tangent, int threads) const {
    run(traces, x, slot, threads, [&](auto& data, auto& call, int64_t count) {
      call.pass = of_tangent ? OpenPass::tangent_backward : OpenPass::backward;
      set(call.flowing, flowing, count * network_.layers.back().out);
      set(call.gradients, gradients, strides);
      set(call.of_input, of_input, count * network_.layers.front().in);
      call.summed = reinterpret_cast<decltype(call.summed)>(summed);
    });
  }

  void tangent(Traces& traces, int slot, Address x, const Addresses& vectors,
               const std::vector<int64_t>& strides, Address output, int threads) const {
    run(traces, x, slot, threads, [&](auto& data, auto& call, int64_t count) {
      call.pass = OpenPass::tangent;
      set(call.vectors, vectors, strides);
      set(call.output, output, count * network_.layers.back().out);
    });
  }

 private:
  Programs programs_;
  cpu::InstructionSet set_;
  cpu::Engine engine_{};
  double seconds_ = 0;
  bool is_double_;
  Description network_;
  Layout layout_;

  template <class T>
  static void set(Global<T>& to, Address address, int64_t stride) {
    to = {reinterpret_cast<T*>(address), stride};
  }
  template <class T>
  static void set(std::vector<Global<T>>& to, const Addresses& addresses,
                  const std::vector<int64_t>& strides) {
    to.resize(addresses.size());
    for (std::size_t i = 0; i < addresses.size(); ++i) set(to[i], addresses[i], strides[i]);
  }

  template <class Fill>
  void run(Traces& traces, Address x, int slot, int threads, Fill fill) const {
    const auto of = [&](const auto& kernel, auto scalar) {
      using T = decltype(scalar);
      const int64_t count = slot < network_.steps ? network_.support : network_.query;
      Data<T> data{};
      OpenCall<T> call{};
      data.tasks = traces.tasks;
      data.task_weights = reinterpret_cast<const T*>(traces.ones.data());
      // Of passes that are given none the stride says that no lanes share a weight.
      data.parameters.assign(network_.layers.size() * kTensors, {nullptr, 1});
      set(data.support_x, x, count * network_.layers.front().in);
      call.slot = slot;
      fill(data, call, count);
      const double passes = 4.0 * network_.steps + 2;
      const int used = seconds_ < cpu::kWorthThreads * passes ? 1 : threads;
      without_gil([&] {
        cpu::run(kernel, network_, layout_, data, call, traces.storage.data(), used);
      });
    };
    is_double_ ? of(engine_.of_double, double()) : of(engine_.of_float, float());
  }
};

}  // namespace

void bind_open(py::module_& module) {
  py::class_<Traces>(module, "Traces");
  py::class_<OpenPasses>(module, "OpenPasses")
      .def(py::init<const std::vector<LayerTuple>&, int, int, int, bool, bool, bool, int64_t,
                    const std::string&, const std::string&, const Programs&>(),
           "layers"_a, "support"_a, "query"_a, "slots"_a, "first_order"_a, "inputs_flow"_a,
           "is_double"_a, "tasks"_a, "instruction_set"_a, "engine"_a, "programs"_a = Programs{})
      .def_property_readonly("parameters", &OpenPasses::parameters)
      .def_property_readonly("together", &OpenPasses::together)
      .def_property_readonly("instruction_set", &OpenPasses::instruction_set)
      .def_property_readonly("engine", &OpenPasses::engine)
      .def_property_readonly("seconds", &OpenPasses::seconds)
      .def("storage_bytes", &OpenPasses::storage_bytes, "tasks"_a)
      .def("traces", &OpenPasses::traces, "tasks"_a)
      .def("forward", &OpenPasses::forward, "traces"_a, "slot"_a, "x"_a, "parameters"_a,
           "strides"_a, "statistics"_a, "output"_a, "threads"_a)
      .def("backward", &OpenPasses::backward, "traces"_a, "slot"_a, "x"_a, "flowing"_a,
           "gradients"_a, "strides"_a, "summed"_a, "of_input"_a, "of_tangent"_a, "threads"_a)
      .def("tangent", &OpenPasses::tangent, "traces"_a, "slot"_a, "x"_a, "vectors"_a, "strides"_a,
           "output"_a, "threads"_a);
}

}  // namespace fastmeta
