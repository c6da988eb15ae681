// The convolutional meta-step as a Python class: addresses and sizes in, everything checked in
// Python.

#include "layered.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/conv/conv_step.h"
#include "cpu/pool.h"
#include "cpu/step.h"
#include "described.h"
#include "signals.h"

namespace fastmeta {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

using Address = uintptr_t;
using Pair = std::array<int, 2>;
// ((channels, height, width, filters), kernel, stride, padding, dilation, norm, eps, slope below
// zero, window of the maximum, whether the mean follows, which tensors it has, which adapt, (the block
// that it reads, the one that it adds))
using BlockTuple = std::tuple<std::array<int, 4>, Pair, Pair, Pair, Pair, int, double, double, Pair,
                              bool, Each, Each, Pair>;

// A block's programs: see conv::Block; null where there is none.
using Expressions = std::array<std::shared_ptr<Program>, 3>;

class ConvStep {
 public:
  ConvStep(const std::vector<BlockTuple>& blocks, int loss, double loss_option, int64_t ignore_index,
           bool weighted, int support, int query, int steps, bool differentiate, bool first_order,
           bool elementwise_rates, bool learned_rates, double prox, bool is_double,
           const std::string& instruction_set, const RuleTuple& rule, bool per_step_support,
           const std::optional<LossTuple>& query_loss, const std::vector<Expressions>& expressions)
      : expressions_(expressions),
        set_(cpu::instruction_set(instruction_set).name),
        kernels_(conv::kernels(set_)),
        is_double_(is_double) {
    for (const auto& [sizes, kernel, stride, padding, dilation, norm, eps, below, window, mean, has,
                      adapts, sources] : blocks) {
      conv::Block block{};
      block.from = sources[0], block.plus = sources[1];
      block.channels = sizes[0], block.height = sizes[1], block.width = sizes[2];
      block.filters = sizes[3];
      std::copy(kernel.begin(), kernel.end(), block.kernel);
      std::copy(stride.begin(), stride.end(), block.stride);
      std::copy(padding.begin(), padding.end(), block.padding);
      std::copy(dilation.begin(), dilation.end(), block.dilation);
      std::copy(window.begin(), window.end(), block.window);
      std::copy(has.begin(), has.end(), block.has);
      std::copy(adapts.begin(), adapts.end(), block.adapts);
      block.norm = Norm(norm), block.eps = eps, block.below = below, block.mean = mean;
      network_.blocks.push_back(block);
    }
    for (std::size_t l = 0; l < expressions.size(); ++l) {
      const auto& [whole, brief, choice] = expressions[l];
      conv::Block& block = network_.blocks[l];
      block.program = whole.get(), block.short_program = brief.get(), block.choice = choice.get();
    }
    network_.loss = {LossKind(loss), loss_option, ignore_index, weighted};
    network_.query_loss = query_loss ? described(*query_loss) : network_.loss;
    network_.support = support, network_.query = query, network_.steps = steps;
    network_.differentiate = differentiate, network_.first_order = first_order;
    network_.elementwise_rates = elementwise_rates, network_.learned_rates = learned_rates;
    network_.prox = prox;
    network_.rule = described(rule), network_.per_step_support = per_step_support;
    const int lanes = is_double ? kernels_.of_double.lanes : kernels_.of_float.lanes;
    layout_ = conv::lay_out(network_, lanes);
    task_seconds_ = conv::seconds(network_, layout_, lanes);
  }

  int64_t gradients() const { return conv::gradient_size(network_); }
  int64_t storage_bytes() const { return layout_.size * (is_double_ ? 8 : 4); }
  std::string instruction_set() const { return set_; }
  int body() const { return layout_.body; }
  double task_seconds() const { return task_seconds_; }

  // False, and nothing is computed, where a label is no class.
  bool run(int64_t tasks, const std::vector<Address>& parameters,
           const std::vector<Address>& adapted, const std::vector<Address>& statistics,
           Address rates,
           const std::vector<double>& step_weights, const std::vector<bool>& evaluates,
           Address task_weights, const std::vector<Address>& support,
           const std::vector<Address>& query, Address support_losses, Address step_losses,
           Address query_outputs, Address gradient, int threads,
           const std::vector<double>& rule_options) const {
    const double* options = checked_options(network_, rule_options);
    if (!are_classes(support[2], tasks * network_.sets() * network_.support, network_.loss) ||
        !are_classes(query[2], tasks * network_.query, network_.query_loss)) {
      return false;
    }
    if (tasks * task_seconds_ < cpu::kWorthThreads) threads = 1;
    const auto of = [&](auto kernel) {
      run_as(kernel, tasks, parameters, adapted, statistics, rates, step_weights, evaluates, task_weights,
             support, query, support_losses, step_losses, query_outputs, gradient, threads, options);
    };
    without_gil([&] { is_double_ ? of(kernels_.of_double) : of(kernels_.of_float); });
    return true;
  }

 private:
  std::vector<Expressions> expressions_;
  std::string set_;
  conv::Kernels kernels_;
  bool is_double_;
  conv::Network network_{};
  conv::Layout layout_;
  double task_seconds_;

  bool are_classes(Address address, int64_t count, const Loss& loss) const {
    if (address == 0) return true;
    const auto labels = reinterpret_cast<const int64_t*>(address);
    const uint64_t classes = network_.blocks.back().filters;
    const int64_t ignored = loss.ignore_index;
    return std::all_of(labels, labels + count, [=](int64_t label) {
      return uint64_t(label) < classes || label == ignored;
    });
  }

  template <class T>
  void run_as(const conv::Kernel<T>& kernel, int64_t tasks, const std::vector<Address>& parameters,
              const std::vector<Address>& adapted, const std::vector<Address>& statistics,
              Address rates,
              const std::vector<double>& step_weights, const std::vector<bool>& evaluates,
              Address task_weights, const std::vector<Address>& support,
              const std::vector<Address>& query, Address support_losses, Address step_losses,
              Address query_outputs, Address gradient, int threads, const double* options) const {
    const auto of = [](Address a) { return reinterpret_cast<T*>(a); };
    const auto integers = [](Address a) { return reinterpret_cast<const int64_t*>(a); };
    conv::Addresses<T> addresses{};
    for (Address a : parameters) addresses.parameters.push_back(of(a));
    for (Address a : adapted) addresses.adapted.push_back(of(a));
    for (Address a : statistics) addresses.statistics.push_back(of(a));
    addresses.rates = of(rates);
    addresses.gradient = of(gradient);
    const std::unique_ptr<bool[]> evaluated(new bool[evaluates.size()]);
    std::copy(evaluates.begin(), evaluates.end(), evaluated.get());
    conv::Call<T> call{};
    call.tasks = tasks;
    call.rule_options = options;
    call.step_weights = step_weights.data();
    call.evaluates = evaluated.get();
    call.task_weights = of(task_weights);
    // Each set is inputs, targets, labels, the loss's weights and how many examples of each task are
    // real; 0 where there is none.
    call.support_x = of(support[0]), call.query_x = of(query[0]);
    call.support_y = of(support[1]), call.query_y = of(query[1]);
    call.support_labels = integers(support[2]), call.query_labels = integers(query[2]);
    call.support_factors = of(support[3]), call.query_factors = of(query[3]);
    call.support_counts = integers(support[4]), call.query_counts = integers(query[4]);
    call.support_losses = of(support_losses), call.step_losses = of(step_losses);
    call.query_outputs = of(query_outputs);
    conv::run(kernel, network_, layout_, call, addresses, threads);
  }
};

}  // namespace

void bind_layered(py::module_& module) {
  py::class_<ConvStep>(module, "ConvStep")
      .def(py::init<const std::vector<BlockTuple>&, int, double, int64_t, bool, int, int, int, bool,
                    bool, bool, bool, double, bool, const std::string&, const RuleTuple&, bool,
                    const std::optional<LossTuple>&, const std::vector<Expressions>&>(),
           "blocks"_a, "loss"_a, "loss_option"_a, "ignore_index"_a, "weighted"_a, "support"_a,
           "query"_a, "steps"_a, "differentiate"_a, "first_order"_a, "elementwise_rates"_a,
           "learned_rates"_a, "prox"_a, "is_double"_a, "instruction_set"_a, "rule"_a = RuleTuple{},
           "per_step_support"_a = false, "query_loss"_a = py::none(), "expressions"_a = std::vector<Expressions>{})
      .def_property_readonly("gradients", &ConvStep::gradients)
      .def_property_readonly("storage_bytes", &ConvStep::storage_bytes)
      .def_property_readonly("instruction_set", &ConvStep::instruction_set)
      .def_property_readonly("body", &ConvStep::body)
      .def_property_readonly("task_seconds", &ConvStep::task_seconds)
      .def("run", &ConvStep::run, "tasks"_a, "parameters"_a, "adapted"_a, "statistics"_a, "rates"_a,
           "step_weights"_a, "evaluates"_a, "task_weights"_a, "support"_a, "query"_a,
           "support_losses"_a, "step_losses"_a, "query_outputs"_a, "gradient"_a, "threads"_a,
           "rule_options"_a = std::vector<double>{});
}

}  // namespace fastmeta
