// The fused meta-step on a GPU as a Python class: addresses, sizes and a stream in; everything is
// checked, and all memory allocated, in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../described.h"
#include "choice.h"
#include "image.h"
#include "step.h"

namespace fastmeta {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

using Address = uintptr_t;

// What `CudaStep.run` is given, each an address in device memory, 0 where there is none.
struct Addresses {
  Address image;
  std::vector<Address> parameters, adapted, statistics;  // layer by layer, in the order of Tensor
  Address rates, step_weights, task_weights;
  // Inputs, targets, labels, example weights and the loss's weights.
  std::vector<Address> support, query;
  // The dual form's products (support, query, gram, cross) and cotangents (support, query).
  std::vector<Address> products;
  Address support_losses, step_losses, query_outputs, workspace, partials, gradient;
  Address rule_options;  // doubles
};

class CudaStep {
 public:
  CudaStep(const std::vector<LayerTuple>& layers, int loss, double loss_option,
           int64_t ignore_index, bool weighted, int support, int query, int steps,
           bool differentiate, bool first_order, bool elementwise_rates, bool learned_rates,
           double prox, bool is_double, int64_t tasks, const std::vector<bool>& evaluates,
           const std::string& form, const std::string& memory, const std::string& storage,
           int threads, const std::pair<int64_t, int>& limits, const RuleTuple& rule,
           bool per_step_support, const std::optional<LossTuple>& query_loss)
      : is_double_(is_double),
        tasks_(tasks),
        inputs_(std::get<0>(layers.front())),
        evaluates_(evaluates.begin(), evaluates.end()),
        choice_(cuda::choose(
            described(layers, {LossKind(loss), loss_option, ignore_index, weighted}, support, query,
                      steps, differentiate, first_order, elementwise_rates, learned_rates, prox,
                      {rule, per_step_support, query_loss}),
            tasks, is_double, {form, memory, storage, threads}, {limits.first, limits.second})) {}

  bool serves() const { return choice_.serves; }
  int64_t task_bytes() const { return choice_.task_bytes; }
  int64_t workspace() const { return choice_.shape.workspace; }
  int64_t blocks() const { return choice_.shape.blocks; }
  int threads() const { return choice_.shape.threads; }
  int64_t gradients() const {
    return choice_.network.differentiate ? gradient_size(choice_.network, choice_.layout) : 0;
  }
  int body() const { return choice_.network.body; }
  bool dual() const { return choice_.network.dual; }
  std::string memory() const {
    if (!sweeps(choice_.network)) return "forward";
    return choice_.network.reversible ? "reversible" : "saved";
  }
  py::bytes image(Address address) const {
    return py::bytes(cuda::image(choice_.network, choice_.layout, evaluates_, address));
  }

  void run(const Addresses& at, bool tf32, int device, Address stream) const {
    if (!is_plain(choice_.network.rule) && at.rule_options == 0) {
      throw std::invalid_argument("rule_options: 0, but the rule has options");
    }
    is_double_ ? run_as<double>(at, tf32, device, stream)
               : run_as<float>(at, tf32, device, stream);
  }

 private:
  bool is_double_;
  int64_t tasks_;
  int inputs_;  // of the first layer; the dual form's network has none
  std::vector<char> evaluates_;
  cuda::Choice choice_;

  template <class T>
  void run_as(const Addresses& at, bool tf32, int device, Address stream) const {
    const Description& network = choice_.network;
    const int64_t n = network.all_support();
    const int64_t q = network.query;
    const int64_t out = network.layers.back().out, wide = network.layers.front().out;
    const auto of = [](Address a) { return reinterpret_cast<T*>(a); };
    const auto labels = [](Address a) { return reinterpret_cast<const int64_t*>(a); };
    cuda::Call<T> call{};
    static_assert(sizeof call <= 4096, "what a launch may carry");
    call.image = reinterpret_cast<const cuda::Image*>(at.image);
    call.tasks = tasks_, call.tasks_each = tasks_ / choice_.shape.blocks;
    call.blocks_with_one_more = tasks_ % choice_.shape.blocks;
    for (std::size_t i = 0; i < at.parameters.size(); ++i) {
      call.parameters[i] = {of(at.parameters[i]), 0};
    }
    for (std::size_t i = 0; i < at.statistics.size(); ++i) {
      call.statistics[i] = {of(at.statistics[i]), 0};
    }
    call.keeps_adapted = !at.adapted.empty();
    call.tf32 = tf32;
    for (std::size_t i = 0; i < at.adapted.size(); ++i) {
      const Dense& layer = network.layers[i / kTensors];
      const bool row = i % kTensors != kWeight;
      call.adapted[i] = {of(at.adapted[i]), row ? layer.out : int64_t(layer.in) * layer.out};
    }
    call.rates = of(at.rates), call.step_weights = of(at.step_weights);
    call.task_weights = of(at.task_weights);
    call.rule_options = reinterpret_cast<const double*>(at.rule_options);
    const int64_t in = inputs_;
    call.support_x = {of(at.support[0]), n * in}, call.query_x = {of(at.query[0]), q * in};
    call.support_y = {of(at.support[1]), n * out}, call.query_y = {of(at.query[1]), q * out};
    call.support_labels = {labels(at.support[2]), n};
    call.query_labels = {labels(at.query[2]), q};
    call.support_weights = {of(at.support[3]), n}, call.query_weights = {of(at.query[3]), q};
    const auto of_classes = [](const Loss& loss) { return loss.kind == LossKind::cross_entropy; };
    call.support_loss_weights = {of(at.support[4]), of_classes(network.loss) ? 0 : n * out};
    call.query_loss_weights = {of(at.query[4]), of_classes(network.query_loss) ? 0 : q * out};
    if (network.dual) {
      call.products = {{of(at.products[0]), n * wide}, {of(at.products[1]), q * wide},
                       {of(at.products[2]), n * n},    {of(at.products[3]), q * n},
                       {of(at.products[4]), n * wide}, {of(at.products[5]), q * wide}};
    }
    call.support_losses = {of(at.support_losses), 1};
    call.step_losses = {of(at.step_losses), 1};
    call.query_outputs = {of(at.query_outputs), q * out};
    call.workspace = of(at.workspace);
    call.partials = of(at.partials), call.sums = gradients();
    py::gil_scoped_release release;
    cuda::run(call, choice_.shape, of(at.gradient), device, reinterpret_cast<void*>(stream));
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "fastmeta's CUDA kernels; called through fastmeta, never directly.";
  module.attr("most_layers") = cuda::kMostLayers;
  module.def(
      "version", [] { return FASTMETA_VERSION; }, "The fastmeta version this was built for.");
  module.def("architectures", [] { return FASTMETA_CUDA_ARCHS; }, "What it holds code for.");
  module.def(
      "limits",
      [](int device) {
        const cuda::Limits found = cuda::limits(device);
        return std::make_pair(found.shared_bytes, found.multiprocessors);
      },
      "Of a device: bytes of shared memory that a block may take, and multiprocessors. Raises "
      "RuntimeError, which says why, where that device can't run the kernels.");
  // Local: the tests have a twin of this module.
  py::class_<CudaStep>(module, "CudaStep", py::module_local())
      .def(py::init<const std::vector<LayerTuple>&, int, double, int64_t, bool, int, int, int,
                    bool, bool, bool, bool, double, bool, int64_t, const std::vector<bool>&,
                    const std::string&, const std::string&, const std::string&, int,
                    const std::pair<int64_t, int>&, const RuleTuple&, bool,
                    const std::optional<LossTuple>&>(),
           "layers"_a, "loss"_a, "loss_option"_a, "ignore_index"_a, "weighted"_a, "support"_a,
           "query"_a, "steps"_a, "differentiate"_a, "first_order"_a, "elementwise_rates"_a,
           "learned_rates"_a, "prox"_a, "is_double"_a, "tasks"_a, "evaluates"_a, "form"_a,
           "memory"_a, "storage"_a, "threads"_a, "limits"_a, "rule"_a = RuleTuple{},
           "per_step_support"_a = false, "query_loss"_a = py::none())
      .def_property_readonly("serves", &CudaStep::serves)
      .def_property_readonly("task_bytes", &CudaStep::task_bytes)
      .def_property_readonly("workspace", &CudaStep::workspace)
      .def_property_readonly("blocks", &CudaStep::blocks)
      .def_property_readonly("threads", &CudaStep::threads)
      .def_property_readonly("gradients", &CudaStep::gradients)
      .def_property_readonly("body", &CudaStep::body)
      .def_property_readonly("dual", &CudaStep::dual)
      .def_property_readonly("memory", &CudaStep::memory)
      .def("image", &CudaStep::image)
      .def("run", [](const CudaStep& step, Address image, const std::vector<Address>& parameters,
                     const std::vector<Address>& adapted, const std::vector<Address>& statistics,
                     Address rates, Address step_weights, Address task_weights,
                     const std::vector<Address>& support, const std::vector<Address>& query,
                     const std::vector<Address>& products, Address support_losses,
                     Address step_losses, Address query_outputs, Address workspace,
                     Address partials, Address gradient, bool tf32, int device,
                     Address stream, Address rule_options) {
        step.run({image, parameters, adapted, statistics, rates, step_weights, task_weights,
                  support, query, products, support_losses, step_losses, query_outputs, workspace,
                  partials, gradient, rule_options},
                 tf32, device, stream);
      }, "image"_a, "parameters"_a, "adapted"_a, "statistics"_a, "rates"_a, "step_weights"_a,
         "task_weights"_a, "support"_a, "query"_a, "products"_a, "support_losses"_a,
         "step_losses"_a, "query_outputs"_a, "workspace"_a, "partials"_a, "gradient"_a, "tf32"_a,
         "device"_a, "stream"_a, "rule_options"_a = Address(0));
}

}  // namespace fastmeta
