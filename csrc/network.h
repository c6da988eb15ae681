// A network, a loss and an inner loop as plain data, and where each matrix of a step lies.
#pragma once

#include <cstdint>
#include <vector>

// What a CUDA compiler needs told of a function that kernels call.
#if defined(__CUDACC__)
#define FASTMETA_DEVICE __device__
// Compiled once: inlined wherever it is called it would make a kernel of megabytes.
#define FASTMETA_ONCE __device__ __noinline__
// Captured by reference: beside many views a rule's coefficients would not fit the registers.
#define FASTMETA_HELD(name) &name
#else
#define FASTMETA_DEVICE
#define FASTMETA_ONCE
#define FASTMETA_HELD(name) name
#endif

namespace fastmeta {

struct Program;
struct LossPrograms;

// Where descriptions, layouts and data lie, which says what their lists are.
struct OnHost {
  template <class T>
  using List = std::vector<T>;
};

enum class Activation { identity, relu, leaky_relu, tanh, sigmoid, elu, softplus, silu, gelu, gelu_tanh, expression };
enum class LossKind { cross_entropy, mse, bce_with_logits, huber, smooth_l1, l1, expression };
// Batch norm by the statistics of the set at hand, or by given ones; by mean 0 and deviation 1, which
// leaves scale and shift of each column; layer norm, and that by root mean square, by the statistics
// of each example.
enum class Norm { none, batch, running, columns, layer, rms };
FASTMETA_DEVICE constexpr bool is_of_examples(Norm norm) { return norm >= Norm::layer; }

// A layer's tensors, in the order in which they lie and are passed.
enum Tensor { kWeight, kBias, kScale, kShift, kTensors };
// Those that are rows [1, H].
constexpr Tensor kRows[] = {kBias, kScale, kShift};

// Where a layer reads: the data, or nothing; else a layer before it, by number.
constexpr int kData = -1, kNone = -2;

// The product x W' + b, maybe another layer's output added to it, maybe a norm, and an elementwise
// function of that. A layer without a weight is as wide as what it reads, which stands for its product.
struct Dense {
  int in, out;
  Activation activation;
  double option, second_option;  // slope, alpha, or beta and threshold
  Norm norm;
  double eps;
  bool has[kTensors], adapts[kTensors];
  // Of an expression: value, slope and curve of z; value and slope.
  const Program *program = nullptr, *short_program = nullptr;
  int from = kData, plus = kNone;  // x, and what is added
  bool masked = false;  // without a weight: whether x is multiplied by a mask, drawn for each pass
  // Found by `connect`: whether later layers read the same, so that its derivative is added to
  // theirs, and whether the output moves with what adapts.
  bool adds_from = false, adds_plus = false, moves = false;
};

struct Loss {
  LossKind kind;
  double option;  // label smoothing, delta or beta
  int64_t ignore_index;
  bool weighted;  // classes have weights, or predictions have a factor of their own
  const LossPrograms* programs = nullptr;  // of an expression
};

// How the inner loop steps along a gradient. Values that are not flags are passed with each call.
enum class RuleKind { sgd, adam, rmsprop };
struct UpdateRule {
  RuleKind kind = RuleKind::sgd;
  bool momentum = false;   // of SGD and RMSprop: whether there is a buffer
  bool nesterov = false;
  bool decays = false;     // whether there is weight decay; decoupled: beside the direction
  bool decoupled = false;
  bool centered = false;   // RMSprop's
  bool clips = false;      // whether the gradient is clipped by its norm
  bool learns[2] = {};     // which of the two options that a rule can learn get a gradient
};
// A rule's options, in the order in which they are passed. RMSprop's alpha is its second beta.
enum RuleOption {
  kMomentum, kDampening, kDecay, kFirstBeta, kSecondBeta, kEps, kEpsRoot, kMaxNorm, kRuleOptions
};
constexpr int kMostStates = 3;

struct Options {
  Loss loss, query_loss;
  int support, query, steps;  // N, Q (0: no query set), K
  bool differentiate, first_order, elementwise_rates, learned_rates;
  double prox;
  UpdateRule rule = {};
  bool per_step_support = false;  // whether each inner step has a support set of its own
  bool dual = false;  // whether the first layer's product is in dual form
  bool reversible = false;  // whether the reverse sweep rebuilds the weights, or finds all K + 1 kept
  int together = 1;   // how many tasks share that form's products with the weight
  int still = 0;      // how many of the first layers do not move with what adapts
  int body = 0;       // how many of those are run once
  bool open = false;  // whether losses and updates are the caller's; then `steps` counts the slots
  bool inputs_flow = false;  // whether derivatives by the inputs are asked for
  // How many examples go through all layers at a time; 0 is all. In how many parts those go, each with
  // gradients of its own, so that threads can share them; and whether what the inner steps' passes
  // leave stays for the Hessian products, or is computed again there.
  int chunk = 0, parts = 1;
  bool keeps_chunks = false;

  // R: the support examples of all inner steps.
  FASTMETA_DEVICE int all_support() const { return support * (per_step_support ? steps : 1); }
  // How many examples of a set's lie in a task's storage, and in how many chunks they go there.
  FASTMETA_DEVICE int rows(int count) const { return chunk > 0 && chunk < count ? chunk : count; }
  FASTMETA_DEVICE int chunks(int count) const {
    return count > 0 ? (count + rows(count) - 1) / rows(count) : 0;
  }
};
template <class Place>
struct DescriptionIn : Options {
  typename Place::template List<Dense> layers;
};
using Description = DescriptionIn<OnHost>;

// Finds out of what layers read what `Dense` says of that, and the longest body.
void connect(Description&);
// Whether anything but the first layer's product reads the data.
bool reads_data_again(const Description&);

// Whether the rule is theta' = theta - a g.
FASTMETA_DEVICE static inline bool is_plain(const UpdateRule& rule) {
  return rule.kind == RuleKind::sgd && !rule.momentum && !rule.decays && !rule.clips;
}
// Whether steps of it move the weights where the gradient's product is made.
template <class Place>
FASTMETA_DEVICE static bool steps_plainly(const DescriptionIn<Place>& network) {
  return is_plain(network.rule) && network.chunk == 0;
}
// Whether it is linear in the gradient, by the same coefficients for all of a tensor.
FASTMETA_DEVICE static inline bool is_linear(const UpdateRule& rule) {
  return rule.kind == RuleKind::sgd && !rule.decays && !rule.clips;
}
// How many values of state a rule has for each element; see update_rules.h.
FASTMETA_DEVICE static inline int states_of(const UpdateRule& rule) {
  return rule.kind == RuleKind::sgd ? 1 : rule.centered ? 3 : 2;
}

// Whether rates or options get a gradient.
template <class Place>
FASTMETA_DEVICE static bool learns_hyperparameters(const DescriptionIn<Place>& network) {
  return network.learned_rates || network.rule.learns[0] || network.rule.learns[1];
}
// Whether the dual form can make the steps of a first layer that adapts: its cotangents then are
// products with the inputs too, and the rule acts on those.
template <class Place>
FASTMETA_DEVICE static bool steps_in_dual_form(const DescriptionIn<Place>& network) {
  return is_plain(network.rule) || (is_linear(network.rule) && !learns_hyperparameters(network));
}
// Whether anything goes backward through the inner steps. Where not, every query gradient counts
// as it is, and is added when the inner loop comes by.
template <class Place>
FASTMETA_DEVICE static bool sweeps(const DescriptionIn<Place>& network) {
  return network.differentiate &&
         (!network.first_order || learns_hyperparameters(network) || network.rule.decays);
}
// Whether a rule's pullback needs the gradient of each step, and the state after each.
template <class Place>
FASTMETA_DEVICE static bool keeps_states(const DescriptionIn<Place>& network) {
  return sweeps(network) && (network.rule.kind != RuleKind::sgd || learns_hyperparameters(network));
}
template <class Place>
FASTMETA_DEVICE static bool keeps_gradients(const DescriptionIn<Place>& network) {
  return keeps_states(network) || (sweeps(network) && network.rule.clips);
}

// Whether the weights after every step are kept for that.
template <class Place>
FASTMETA_DEVICE static bool keeps_weights(const DescriptionIn<Place>& network) {
  return sweeps(network) && !network.reversible;
}

// A matrix in a task's storage. A stride of 0 repeats a row or a column.
struct View {
  int64_t offset;
  int rows, cols, row_stride, col_stride;
};

// Sums over the examples [1, H] of a derivative and of the normalised product times it.
struct Sums {
  View plain, along;
};

// What a layer keeps of a pass over some examples.
struct Trace {
  View value;  // the output [N, H]
  View delta;  // the loss's derivative before the activation [N, H]
  View slope;  // f'(z), where it can't be had from the output
  View curve;  // f''(z) times the derivative after the activation, likewise; of the support set
  // The product and the derivative there [N, H]; of a layer without a norm they lie where `value`
  // and `delta` do, and a norm leaves the product normalised.
  View product, product_delta;
  // Of the norm: mean and 1 / standard deviation [1, H], or of examples [N, 1].
  View mean, inverse;
  Sums sums;     // of the norm: of `delta`
  Sums of_rows;  // of a norm of examples: the same over each example [N, 1], by scale
  View mask;     // of a masked layer [N, H]
  View softmax;        // of the last layer, where `value` lies if no activation needs that
};

// Scratch of the Hessian-vector product.
struct Tangent {
  View value, bend, delta;     // each [N, H]
  View normalised;              // of the norm [N, H]
  Sums value_sums, delta_sums;  // of the norm
  Sums of_rows;                 // of a norm of examples [N, 1], of `delta`
};

struct ExampleViews {
  View inputs, targets, weights;  // [N, D], [N, C], [N, 1]
  View of_inputs;                 // the derivative by the inputs, where that is asked for
  View of_inputs_before;          // of chunks: what earlier passes have found of it
  View row, second_row;           // scratch columns [N, 1]
  View loss_weights;              // of the classes [1, C], or of each prediction [N, C]
  View mass;                      // what its labels count for together [1, 1]
};
template <class Place>
struct ExamplesIn : ExampleViews {
  typename Place::template List<Trace> traces;  // [steps kept * layers]; body: of step 0
  // Of a loss that is an expression: what it reads beside the prediction, and of those inputs that
  // learn the gradient at hand and its sum over the task's steps.
  typename Place::template List<View> loss_inputs, gradients, sums;
};
using Examples = ExamplesIn<OnHost>;

// Where a layer's tensors lie. Offsets count the engine's scalars (a vector of tasks, where the
// lanes are tasks).
struct LayerPlace {
  int64_t of[kTensors];                      // within a block of parameters
  int weight_row_stride, weight_col_stride;  // of the weight as torch has it [out, in]
  View mean, inverse;                        // given statistics [1, H]
  View one, zero;                            // in place of what a norm lacks
};

// Of the first layer's product, where it is in dual form.
struct DualViews {
  View weight, gradient;      // [H, D]
  View support, query;        // X W_0' of the tasks together [G R, H], [G Q, H]; on a GPU the first
  View gram, cross;           // X X', X_q X' [R, R], [Q, R]
  View of_query, of_support;  // C of the tasks together [G Q, H], [G R, H]
  View pull, along;           // X X_q' C_q, X lambda' [R, H]
  View buffer, buffer_cotangent;  // of momentum: B with b = B' X, and X nu' [R, H]
};
template <class Place>
struct DualPlaceIn : DualViews {
  typename Place::template List<View> steps;  // S_k [R, H]
};

struct Offsets {
  int64_t parameters = 0;  // P
  int64_t block = 0;       // the length of a block of parameters, padding included
  int64_t body = 0;        // how much of that is the body's: there in theta_0 and lambda alone
  int64_t theta = 0;       // blocks: theta_0, then one each step, or one that all steps share
  int64_t lambda = 0, vector = 0, anchor = 0, gradient = 0, rate = 0;
  // Of an update rule: its state and the state's cotangents, what a step adds to the gradients of rate
  // and options, and ones to sum that with.
  int64_t states[kMostStates] = {}, cotangents[kMostStates] = {};
  int64_t slopes[3] = {}, ones = 0;
  View clips = {};  // of each step [K, 1]
  int thetas_kept = 0, traces_kept = 0;
  int64_t captured = 0;  // the sizes of what losses learn
  int64_t partial = 0;   // a block: the gradient of a part of the chunks
  View loss = {}, chunk_loss = {};  // of those, and of one of them [1, 1]
  View scalar, sum, one, zero;  // each [1, 1]
  int64_t scratch = 0;     // the engine's own, as long as two weights
  int64_t size = 0;
};
template <class Place>
struct LayoutIn : Offsets {
  typename Place::template List<LayerPlace> layers;
  DualPlaceIn<Place> dual;
  ExamplesIn<Place> support, query;
  typename Place::template List<Tangent> tangents;  // [layers]
};
// `parts`: the same storage as each part of the chunks sees it.
struct Layout : LayoutIn<OnHost> {
  std::vector<LayoutIn<OnHost>> parts;
};

// How far apart a matrix's rows begin where they lie in a GPU's shared memory, of 32 banks. `odd`: an
// odd count of elements, so that 32 elements of a column lie in different banks, as a row's do.
// `float4`: four times an odd count, and every matrix begins at a multiple of four: 16 bytes can be
// read at once, and those of 8 rows in a column lie in different banks.
enum class Rows { close, odd, float4 };

// From one row to the next, where a matrix of so many columns is padded to whole vectors. An odd number
// of vectors: at a power of two the rows of a narrow strip would meet in a few sets of the cache.
constexpr int padded(int cols, int width) {
  const int vectors = (cols + width - 1) / width;
  return width > 1 && vectors > 4 ? (vectors | 1) * width : vectors * width;
}

// `width` is how many columns of a matrix the engine takes at a time. Above 1, rows are padded to
// a multiple of it, and weights lie input by input, so that a product's columns lie side by side.
Layout lay_out(const Description&, int width, Rows rows = Rows::close);

// Whether f'(z) and f''(z) / f'(z) follow from f(z) at hardly any cost.
FASTMETA_DEVICE constexpr bool follows_from_output(Activation kind) {
  return kind < Activation::softplus;
}
FASTMETA_DEVICE constexpr bool is_bent(Activation kind) {
  return kind >= Activation::tanh;
}

// An address outside the tasks' storage. A stride of 0 is one that the tasks share.
template <class T>
struct Global {
  T* data;
  int64_t task_stride;
  FASTMETA_DEVICE bool given() const { return data != nullptr; }
  FASTMETA_DEVICE Global at(int64_t offset) const { return {data + offset, task_stride}; }
};
// That of step k, where there is one.
template <class T>
FASTMETA_DEVICE static Global<T> at_step(Global<T> all, int k, int64_t size) {
  return all.given() ? all.at(k * size) : all;
}

// One call's data. Parameters and adapted ones come layer by layer in the order of `Tensor`.
template <class Scalar, class Place = OnHost>
struct Data {
  int64_t tasks;
  typename Place::template List<Global<const Scalar>> parameters;
  typename Place::template List<Global<Scalar>> adapted;           // empty unless asked for
  typename Place::template List<Global<const Scalar>> statistics;  // mean, inverse of each norm
  const Scalar* rates;  // [K, tensors], or [K, P] if elementwise
  Global<const Scalar> elementwise_rates;
  typename Place::template List<Scalar> step_weights;  // [K + 1]
  typename Place::template List<char> evaluates;       // [K + 1]
  // Of the rows of the last chunk 1, or 0 where the chunk before has had them.
  const Scalar *support_tail = nullptr, *query_tail = nullptr;
  const Scalar* task_weights;        // [T]
  const double* rule_options;        // [kRuleOptions]; null for plain SGD
  Global<const Scalar> support_x, query_x, support_y, query_y, support_weights, query_weights;
  Global<const int64_t> support_labels, query_labels;
  Global<const Scalar> support_loss_weights, query_loss_weights;
  Global<const Scalar> support_mass, query_mass;  // of the labels of sets that go in chunks
  typename Place::template List<Global<const Scalar>> support_loss_inputs, query_loss_inputs;
  // Of each layer the masks of all passes, [T, K, N, H] and [T, query losses, Q, H]; empty without any.
  typename Place::template List<Global<const Scalar>> support_masks, query_masks;
  // Of the support set, where each step has its own, tasks are K sets apart.
  Global<Scalar> support_losses;  // [K, T]
  Global<Scalar> step_losses;     // [K + 1, T]
  Global<Scalar> query_outputs;   // [T, Q, C]
  // The gradients by the inputs, where they are asked for: [T, N, D] or [T, K, N, D], and [T, Q, D].
  Global<Scalar> of_support, of_query;
  Scalar* gradient;  // [P], [K, tensors] or [K, P] of learned rates, learned options, of losses
};

// The size of the learned rates' gradients.
template <class Place>
FASTMETA_DEVICE static int64_t rate_gradients(const DescriptionIn<Place>& network,
                                              const LayoutIn<Place>& layout) {
  if (!network.learned_rates) return 0;
  return network.steps * (network.elementwise_rates ? layout.parameters
                                                    : kTensors * int64_t(layout.layers.size()));
}
int64_t gradient_size(const Description&, const LayoutIn<OnHost>&);

}  // namespace fastmeta
