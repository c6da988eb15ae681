// The fused meta-step as a Python class: addresses and sizes in, everything checked in Python.

#include "fused.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/masses.h"
#include "cpu/pool.h"
#include "cpu/step.h"
#include "described.h"
#include "network.h"
#include "reversible.h"
#include "signals.h"

namespace fastmeta {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

using Address = uintptr_t;
// What losses that are expressions read, or the layers' masks: addresses, and how far apart the tasks' are.
using Inputs = std::vector<std::pair<Address, int64_t>>;

class FusedStep {
 public:
  FusedStep(const std::vector<LayerTuple>& layers, int loss, double loss_option,
            int64_t ignore_index, bool weighted, int support, int query, int steps, bool differentiate,
            bool first_order, bool elementwise_rates, bool learned_rates, double prox,
            bool is_double, int64_t tasks, const std::string& instruction_set,
            const std::string& engine, const std::string& form, const std::string& memory,
            const RuleTuple& rule, bool per_step_support, const std::optional<LossTuple>& query_loss,
            const Programs& programs, const std::string& chunk, bool inputs_flow)
      : programs_(programs),
        set_(cpu::instruction_set(instruction_set)),
        is_double_(is_double),
        network_(described(layers, {LossKind(loss), loss_option, ignore_index, weighted}, support,
                           query, steps, differentiate, first_order, elementwise_rates,
                           learned_rates, prox, {rule, per_step_support, query_loss})) {
    give(network_, programs_);
    network_.inputs_flow = inputs_flow;
    network_.dual = cpu::dual(form, network_);
    network_.together = cpu::together(network_, tasks);
    const cpu::Chosen chosen = cpu::choose_engine(set_, engine, network_, tasks, is_double);
    engine_ = chosen.engine, seconds_ = chosen.seconds;
    const int width = is_double ? engine_.of_double.width : engine_.of_float.width;
    const int together = this->tasks();
    cpu::cut(chunk, form, network_, (tasks + together - 1) / together, int(bytes(1)),
             lay_out(network_, width).size);
    if (network_.chunk > 0 && sweeps(network_) && memory != "reversible") {
      network_.keeps_chunks = memory == "saved" || bytes(least_kept()) <= cpu::kLarge;
      if (memory != "saved") keep_if_it_fits(width);
    }
    network_.reversible = cpu::reversible(memory, network_, bytes(lay_out(network_, width).block));
    if (network_.reversible) {
      saved_ = network_;
      saved_.reversible = false;
      saved_layout_ = lay_out(saved_, width);
    }
    layout_ = lay_out(network_, width);
  }

  int64_t parameters() const { return layout_.parameters; }
  int64_t gradients() const { return gradient_size(network_, layout_); }
  int64_t storage_bytes() const { return bytes(layout_.size); }
  // Of the parameters, gradients and state of each step, which a rule's pullback needs.
  int64_t rule_bytes() const {
    if (steps_plainly(network_) || !sweeps(network_)) return 0;
    const int sets = 1 + int(keeps_gradients(network_)) +
                     (keeps_states(network_) ? states_of(network_.rule) : 0);
    return bytes(network_.steps * sets * (layout_.block - layout_.body));
  }
  int tasks() const { return is_double_ ? engine_.of_double.tasks : engine_.of_float.tasks; }
  std::string instruction_set() const { return set_.name; }
  std::string engine() const { return engine_.name; }
  double seconds() const { return seconds_; }
  int body() const { return network_.body; }
  int chunk() const { return network_.chunk; }
  std::string form() const { return network_.dual ? "dual" : "primal"; }
  std::string memory() const {
    if (!sweeps(network_)) return "forward";
    if (network_.chunk > 0) return network_.keeps_chunks ? "saved" : "computed again";
    return network_.reversible ? "reversible" : "saved";
  }

  // False, and nothing is computed, where a label is no class.
  bool run(int64_t tasks, const std::vector<Address>& parameters,
           const std::vector<Address>& adapted, const std::vector<Address>& statistics,
           Address rates, const std::vector<double>& step_weights, const std::vector<bool>& evaluates,
           Address task_weights, const std::vector<Address>& support,
           const std::vector<Address>& query, Address support_losses, Address step_losses,
           Address query_outputs, Address gradient, int threads,
           const std::vector<double>& rule_options, const Inputs& support_inputs,
           const Inputs& query_inputs, const Inputs& support_masks, const Inputs& query_masks,
           const std::pair<Address, Address>& of_inputs) const {
    static const double kNoOptions[kRuleOptions] = {};
    const double* options = checked_options(network_, rule_options);
    if (options == nullptr) options = kNoOptions;
    if (!are_classes(support[2], tasks * network_.all_support(), network_.loss) ||
        !are_classes(query[2], tasks * network_.query, network_.query_loss)) {
      return false;
    }
    if (seconds_ < cpu::kWorthThreads) threads = 1;
    const auto of = [&](const auto& kernel) {
      run_as(kernel, tasks, parameters, adapted, statistics, rates, step_weights, evaluates,
             task_weights, support, query, support_losses, step_losses, query_outputs, gradient,
             threads, options, support_inputs, query_inputs, support_masks, query_masks, of_inputs);
    };
    without_gil([&] { is_double_ ? of(engine_.of_double) : of(engine_.of_float); });
    return true;
  }

 private:
  // The bytes that this many of the engine's scalars take.
  int64_t bytes(int64_t scalars) const { return scalars * tasks() * (is_double_ ? 8 : 4); }

  Programs programs_;
  cpu::InstructionSet set_;
  cpu::Engine engine_{};
  double seconds_ = 0;
  bool is_double_;
  Description network_;
  Layout layout_;
  // The same with the weights of all steps, for rates with which the inner loop can't go back.
  Description saved_{};
  Layout saved_layout_;

  // Outputs and derivatives of all chunks: of very many a layout would be long itself.
  int64_t least_kept() const {
    int64_t values = 0;
    for (const Dense& layer : network_.layers) values += 2 * layer.out;
    return values * network_.steps * network_.chunks(network_.support) * network_.chunk;
  }

  // In as many parts as there is room for: what stays is worth more than a thread of many.
  void keep_if_it_fits(int width) {
    const int most = network_.parts;
    while (network_.keeps_chunks && bytes(lay_out(network_, width).size) > cpu::kLarge) {
      network_.keeps_chunks = network_.parts > 2;
      network_.parts = network_.keeps_chunks ? network_.parts / 2 : most;
    }
  }

  bool are_classes(Address address, int64_t count, const Loss& loss) const {
    if (address == 0) return true;
    const auto labels = reinterpret_cast<const int64_t*>(address);
    const uint64_t classes = network_.layers.back().out;
    const int64_t ignored = loss.ignore_index;
    bool wrong = false;
    for (int64_t i = 0; i < count; ++i) {
      wrong |= uint64_t(labels[i]) >= classes && labels[i] != ignored;
    }
    return !wrong;
  }

  template <class T>
  void run_as(const cpu::Kernel<T>& kernel, int64_t tasks, const std::vector<Address>& parameters,
              const std::vector<Address>& adapted, const std::vector<Address>& statistics,
              Address rates, const std::vector<double>& step_weights, const std::vector<bool>& evaluates,
              Address task_weights, const std::vector<Address>& support,
              const std::vector<Address>& query, Address support_losses, Address step_losses,
              Address query_outputs, Address gradient, int threads, const double* options,
              const Inputs& support_inputs, const Inputs& query_inputs,
              const Inputs& support_masks, const Inputs& query_masks,
              const std::pair<Address, Address>& of_inputs) const {
    const int in = network_.layers.front().in, out = network_.layers.back().out;
    const auto of = [](Address a) { return reinterpret_cast<T*>(a); };
    const auto labels = [](Address a) { return reinterpret_cast<const int64_t*>(a); };
    Data<T> data{};
    data.tasks = tasks;
    for (Address a : parameters) data.parameters.push_back({of(a), 0});
    for (std::size_t i = 0; i < adapted.size(); ++i) {
      const Dense& layer = network_.layers[i / kTensors];
      const bool row = i % kTensors != kWeight;
      data.adapted.push_back({of(adapted[i]), row ? layer.out : int64_t(layer.in) * layer.out});
    }
    for (Address a : statistics) data.statistics.push_back({of(a), 0});
    data.rates = of(rates);
    data.elementwise_rates = {of(rates), 0};
    data.step_weights.assign(step_weights.begin(), step_weights.end());
    data.evaluates.assign(evaluates.begin(), evaluates.end());
    data.task_weights = of(task_weights);
    data.rule_options = options;
    // Each set is inputs, targets, labels, example weights and the loss's weights; 0 where there
    // is none.
    const int64_t n = network_.all_support();
    const int64_t q = network_.query;
    data.support_x = {of(support[0]), n * in};
    data.support_y = {of(support[1]), n * out};
    data.support_labels = {labels(support[2]), n};
    data.support_weights = {of(support[3]), n};
    data.query_x = {of(query[0]), q * in};
    data.query_y = {of(query[1]), q * out};
    data.query_labels = {labels(query[2]), q};
    data.query_weights = {of(query[3]), q};
    const auto of_classes = [](const Loss& loss) { return loss.kind == LossKind::cross_entropy; };
    data.support_loss_weights = {of(support[4]), of_classes(network_.loss) ? 0 : n * out};
    data.query_loss_weights = {of(query[4]), of_classes(network_.query_loss) ? 0 : q * out};
    const auto each = [&](const Inputs& given, auto& to) {
      for (const auto& [address, stride] : given) to.push_back({of(address), stride});
    };
    each(support_inputs, data.support_loss_inputs), each(query_inputs, data.query_loss_inputs);
    each(support_masks, data.support_masks), each(query_masks, data.query_masks);
    std::vector<T> tails[2], masses[2];
    for (int set = 0; set < 2 && network_.chunk > 0; ++set) {
      const int count = set == 0 ? network_.support : network_.query;
      const int rows = network_.rows(count), past = rows * network_.chunks(count) - count;
      tails[set].assign(rows, T(1));
      std::fill_n(tails[set].begin(), past, T(0));
    }
    data.support_tail = tails[0].data(), data.query_tail = tails[1].data();
    if (network_.chunk > 0) {
      const int sets = network_.per_step_support ? network_.steps : 1;
      masses[0] = cpu::masses<T>(network_.loss, labels(support[2]), of(support[3]), of(support[4]),
                              tasks * sets, network_.support);
      masses[1] = cpu::masses<T>(network_.query_loss, labels(query[2]), of(query[3]), of(query[4]), tasks,
                              network_.query);
      if (!masses[0].empty()) data.support_mass = {masses[0].data(), sets};
      if (!masses[1].empty()) data.query_mass = {masses[1].data(), 1};
    }
    data.support_losses = {of(support_losses), 1};
    data.step_losses = {of(step_losses), 1};
    data.query_outputs = {of(query_outputs), q * out};
    data.of_support = {of(of_inputs.first), n * in};
    data.of_query = {of(of_inputs.second), q * in};
    data.gradient = of(gradient);
    if (can_go_back(network_, layout_, data.rates)) {
      cpu::run(kernel, network_, layout_, data, threads);
    } else {
      cpu::run(kernel, saved_, saved_layout_, data, threads);
    }
  }
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::InstructionSet& set : cpu::instruction_sets()) names.push_back(set.name);
  return names;
}

}  // namespace

void bind_fused(py::module_& module) {
  module.def("instruction_sets", &instruction_sets,
             "The instruction sets that the fused step runs here, the best first.");
  py::class_<FusedStep>(module, "FusedStep")
      .def(py::init<const std::vector<LayerTuple>&, int, double, int64_t, bool, int, int, int,
                    bool, bool, bool, bool, double, bool, int64_t, const std::string&,
                    const std::string&, const std::string&, const std::string&, const RuleTuple&,
                    bool, const std::optional<LossTuple>&, const Programs&, const std::string&, bool>(),
           "layers"_a, "loss"_a, "loss_option"_a, "ignore_index"_a, "weighted"_a, "support"_a,
           "query"_a, "steps"_a, "differentiate"_a, "first_order"_a, "elementwise_rates"_a,
           "learned_rates"_a, "prox"_a, "is_double"_a, "tasks"_a, "instruction_set"_a, "engine"_a,
           "form"_a, "memory"_a, "rule"_a = RuleTuple{}, "per_step_support"_a = false,
           "query_loss"_a = py::none(), "programs"_a = Programs{}, "chunk"_a = "", "inputs_flow"_a = false)
      .def_property_readonly("parameters", &FusedStep::parameters)
      .def_property_readonly("gradients", &FusedStep::gradients)
      .def_property_readonly("storage_bytes", &FusedStep::storage_bytes)
      .def_property_readonly("rule_bytes", &FusedStep::rule_bytes)
      .def_property_readonly("tasks", &FusedStep::tasks)
      .def_property_readonly("instruction_set", &FusedStep::instruction_set)
      .def_property_readonly("engine", &FusedStep::engine)
      .def_property_readonly("seconds", &FusedStep::seconds)
      .def_property_readonly("body", &FusedStep::body)
      .def_property_readonly("form", &FusedStep::form)
      .def_property_readonly("chunk", &FusedStep::chunk)
      .def_property_readonly("memory", &FusedStep::memory)
      .def("run", &FusedStep::run, "tasks"_a, "parameters"_a, "adapted"_a, "statistics"_a, "rates"_a,
           "step_weights"_a, "evaluates"_a, "task_weights"_a, "support"_a, "query"_a,
           "support_losses"_a, "step_losses"_a, "query_outputs"_a, "gradient"_a, "threads"_a,
           "rule_options"_a = std::vector<double>{}, "support_inputs"_a = Inputs{},
           "query_inputs"_a = Inputs{}, "support_masks"_a = Inputs{}, "query_masks"_a = Inputs{},
           "of_inputs"_a = std::pair<Address, Address>{});
}

}  // namespace fastmeta
