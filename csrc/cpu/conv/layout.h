// Convolutional blocks as plain data, and where everything of a meta-step lies.
#pragma once

#include <cstdint>
#include <vector>

#include "../../expression.h"
#include "../../network.h"

namespace fastmeta::conv {

// What kernels and the layout agree on.
constexpr int kMostRows = 16;                  // of a tile of a product
constexpr int kMostBehind = 5;                 // images that a tile reads behind the last
constexpr int kTermNumbers = 6;                // that hold one term of a product
constexpr int kGap = 16;                       // elements behind each row of a panel
constexpr int64_t kPanelBytes = 128 << 10;     // of rows at a time, unless they are very long
// Derivatives go to chunks of images at a time, of so many elements, which stay in the second cache.
constexpr int64_t kChunk = 1 << 16;
constexpr int kPlane = 28 * 64;                // elements of a plane of Winograd's transforms
constexpr int kPlaneGap = 80;                  // and behind each
constexpr int kShallow = 32;  // values that a pixel reads, few enough for their covariance

// Of Winograd's transforms by tiles of so many output pixels a side.
constexpr int planes_of(int side) { return (side + 2) * (side + 2); }
constexpr int kMostPlanes = planes_of(4);
// The side that takes less, of 2 and 4: a plane costs its tiles, and its weight's transform as much
// as 45 more (by a fit to what bench/convolution_layers.py prints).
inline int tile_side(int rows, int cols, int64_t examples) {
  const auto cost = [=](int side) {
    const int64_t tiles = int64_t((rows + side - 1) / side) * ((cols + side - 1) / side);
    return planes_of(side) * (tiles * examples + 45);
  };
  return cost(4) < cost(2) ? 4 : 2;
}

constexpr int kData = -1, kNone = -1;

// A convolution, then maybe a norm, another block's output added, an activation (piecewise linear, or
// an expression) and a pooling. A linear layer is the one whose kernel is as large as its input.
struct Block {
  int from = kData;             // whose output it reads, of those before it; or the data
  int plus = kNone;             // whose output it adds, likewise; or none
  int channels, height, width;  // of the input
  int filters;
  int kernel[2], stride[2], padding[2], dilation[2];
  Norm norm;
  double eps;
  double below;   // a piecewise linear activation's slope up to zero
  int window[2];  // of the maximum that follows; 1, 1 where none does
  // An expression as activation; null where there is none.
  const Program* program = nullptr;        // value, slope and curvature
  const Program* short_program = nullptr;  // value and slope
  const Program* choice = nullptr;         // the value alone, where the maximum is one of its values
  bool mean;      // whether the mean over the image follows
  bool has[kTensors], adapts[kTensors];
};

struct Network {
  std::vector<Block> blocks;  // each is read by a later one, but the last
  Loss loss, query_loss;
  int support, query, steps;  // N, Q (0: no query set), K
  bool differentiate, first_order, elementwise_rates, learned_rates;
  double prox;
  UpdateRule rule = {};
  bool per_step_support = false;  // whether each inner step has a support set of its own
  // The support sets of a task, and the one of step k among them.
  int sets() const { return per_step_support ? steps : 1; }
  int set(int k) const { return per_step_support ? k : 0; }
};

// Taps that read pixels side by side: from (row, col) of the first, `count` pixels on.
struct Run {
  int row, col, count;
};

// For which output pixels a convolution, or its adjoint, reads which input pixels: output (y, x) lies
// at place * step + start of its image, and reads from (y, x) * scale + origin + the run's own.
struct Grid {
  int rows, cols;
  int start[2], step[2];
  int origin[2], scale[2];
  std::vector<Run> runs;
  std::vector<int> taps;  // which of the kernel's each one read is, in order
};

// Sizes that follow from a block's, and where its tensors lie in a block of parameters.
struct Shape {
  int in, out;            // channels, filled up to whole vectors (the data's are as they come)
  int height, width;      // of the input, with the frame that it lies in
  int rows, cols;         // of the convolution's output
  int out_rows, out_cols; // after pooling
  Grid forward;
  std::vector<Grid> backward;
  // Whether windows' values are compared, its own or those of sums that its output is a part of.
  bool compared;
  // Whether derivatives by what it reads, or by what it adds, are added to those that lie there.
  bool from_adds, plus_adds;
  int64_t of[kTensors];   // the weight is [taps, in, out], the others [out]
  int64_t given;          // mean and 1 / deviation [2, out], where they are; behind the parameters
  int depth() const { return int(forward.taps.size()) * in; }
  int pixels() const { return rows * cols; }
  int out_pixels() const { return out_rows * out_cols; }
  int64_t product_size() const { return int64_t(pixels()) * out; }     // of one image
  int64_t input_size() const { return int64_t(height) * width * in; }
};

// What a block keeps of a pass over some examples: offsets into a thread's workspace.
struct Kept {
  int64_t product;       // of the convolution [N, rows, cols, out]
  int64_t value;         // of norm, activation and maximum [N, out_rows, out_cols, out]
  int64_t slope, curve;  // of an expression there; the curvature times delta after that; or -1
  int64_t output;        // the value, or its mean over the image [N, out]
  int64_t delta, output_delta;  // derivatives by value and output
  int64_t product_delta;        // and by the product, where it is kept; else -1
  int64_t statistics;    // mean, 1 / deviation, and the sums of derivatives [4, out]
  int64_t code;          // which pixels are the greatest [N, out_rows, out_cols, out], where kept
  // Of the block that goes by patches of the data, in place of products:
  // Mean [depth] and covariance [depth, depth] of patches, in double precision.
  int64_t measured;
  int64_t patch_sums;    // of derivatives times patches [depth, out]
};

// The same of the tangents.
struct Moving {
  int64_t product, value, output, delta, output_delta;
  int64_t bent;  // of an expression: curvature times delta times its argument's tangent
  int64_t sums;  // of the product's [2, out]
};

struct Layout {
  std::vector<Shape> shapes;
  // Blocks in front that are run once, because nothing in them adapts. Of their outputs the others
  // read that of the last alone.
  int body = 0;
  int64_t block = 0, given = 0;  // elements of a block of parameters, and of given statistics
  int steps_kept = 0, weights_kept = 0, gradients_kept = 0, states_kept = 0, sets_kept = 0;
  int64_t weights = 0, lambda = 0, vector = 0, anchor = 0, gradient = 0;
  // Of an update rule: its state, whose cotangents, and what clipping scales the gradients by.
  int64_t states[kMostStates] = {}, cotangents[kMostStates] = {}, clips = 0;
  int64_t transposed[2] = {0, 0}, prepared[2] = {0, 0};  // weights as kernels take them
  // Channels last, in a frame of zeros as wide as the padding of the block that goes by patches.
  int64_t support_x = 0, query_x = 0;
  int64_t support_size = 0;  // of a set
  int64_t support_loss = 0, query_loss = 0;
  std::vector<Kept> support, query;  // [steps kept * blocks], [blocks]
  std::vector<Moving> moving;        // [blocks]
  int64_t product_delta = 0;         // of the block at hand, where it is not kept
  int64_t part = 0;                  // of a derivative, on its way to what it is added to
  int64_t weight_sums = 0;           // of a weight's gradient
  int64_t arguments = 0, choices = 0;  // of expressions by whose values maxima are chosen
  int patched = kNone;               // the block that goes by patches of the data; or none
  int frame[2] = {0, 0};             // around the data
  bool centres = false;              // whether no output changes with the data's level
  // Of that block, whose products are not kept:
  int strip_rows = 0;                // of them at a time
  int patch_pitch = 0;               // what a row of a patch spans, filled up to whole vectors
  int64_t patches = 0;               // scratch to measure them
  int64_t strip = 0;                 // its product in so many rows
  int64_t first = 0;                 // scratch [1 + 4 depth, out]
  int64_t support_measured = 0, query_measured = 0;  // see Kept
  int64_t planes = 0, panel = 0, terms = 0, pulls = 0, one = 0, zero = 0;
  int64_t size = 0;
};

// Whether rates or options of the update rule get a gradient.
bool learns_hyperparameters(const Network&);

// Whether anything goes backward through the inner steps.
bool sweeps(const Network&);

// The sizes of a block that reads `in` channels in such a frame, for vectors of so many lanes.
Shape shape_of(const Block&, int in, const int* frame, int lanes);

// For vectors of so many lanes.
Layout lay_out(const Network&, int lanes);

// One call's data; tasks lie one after the other.
template <class T>
struct Call {
  int64_t tasks;
  const T* parameters;  // a block of them as laid out, then the given statistics
  const T* rates;       // [K, blocks * kTensors], or [K, block]
  const double* rule_options;  // [kRuleOptions]; null for plain SGD
  const double* step_weights;
  const bool* evaluates;
  const T* task_weights;
  // Where each step has its own support set, those of a task are [K, ...] instead of [...].
  const int64_t *support_counts, *query_counts;  // of real examples, which come first; or null
  const T *support_x, *query_x;  // [T, N, C, H, W]
  const T *support_y, *query_y;
  const int64_t *support_labels, *query_labels;
  const T *support_factors, *query_factors;  // the loss's weights
  T *support_losses, *step_losses, *query_outputs;
};

}  // namespace fastmeta::conv
