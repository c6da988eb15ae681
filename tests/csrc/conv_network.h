// A convolutional network, drawn: blocks one after another, some of them with residual sums.
#pragma once

#include "cpu/conv/layout.h"
#include "problem.h"
#include "programs.h"

namespace fastmeta::tests {

// The sides of a convolution's output, and of what its block gives.
inline int product_side(const conv::Block& b, int axis) {
  const int size = axis == 0 ? b.height : b.width;
  const int reach = b.dilation[axis] * (b.kernel[axis] - 1) + 1;
  return (size + 2 * b.padding[axis] - reach) / b.stride[axis] + 1;
}
inline int side(const conv::Block& b, int axis) {
  return b.mean ? 1 : product_side(b, axis) / b.window[axis];
}

inline conv::Block linear(int channels, int height, int width, int filters) {
  conv::Block b{};
  b.channels = channels, b.height = height, b.width = width, b.filters = filters;
  b.below = 1;
  for (int axis = 0; axis < 2; ++axis) b.stride[axis] = b.dilation[axis] = b.window[axis] = 1;
  b.kernel[0] = height, b.kernel[1] = width;
  return b;
}

inline void draw_norm(Random& random, conv::Block& b) {
  b.norm = Norm(random.below(3));
  b.eps = 0.1;  // large, or few pixels that are nearly alike would magnify every rounding error
}

// What follows the convolution.
inline void draw_rest(Random& random, conv::Block& b) {
  for (int axis = 0; axis < 2; ++axis) {
    if (product_side(b, axis) > 1 && random.coin()) b.window[axis] = 2;
  }
  draw_norm(random, b);
  b.below = random.of<double>({0, 0.2, 1});
  if (b.below != 1 || random.coin()) return;
  static const Program whole = steep(3), brief = steep(2), choice = steep(1);
  b.program = &whole, b.short_program = &brief;
  // The maximum behind the expression, or before it.
  if (random.coin()) b.choice = &choice;
}

// Half of them are 3 x 3 convolutions of stride 1, which Winograd's transforms serve.
inline conv::Block block(Random& random, int channels, int height, int width) {
  conv::Block b = linear(channels, height, width, random.of<int>({1, 5, 16, 33}));
  const bool plain = random.coin();
  for (int axis = 0; axis < 2; ++axis) {
    const int size = axis == 0 ? height : width;
    b.kernel[axis] = plain ? 3 : 1 + random.below(4);
    b.padding[axis] = plain ? 1 : random.below(b.kernel[axis]);
    b.stride[axis] = plain ? 1 : 1 + random.below(3);
    b.dilation[axis] = plain ? 1 : 1 + random.below(2);
    if (b.dilation[axis] * (b.kernel[axis] - 1) + 1 > size + 2 * b.padding[axis]) {
      b.kernel[axis] = b.dilation[axis] = 1, b.padding[axis] = 0;
    }
  }
  draw_rest(random, b);
  return b;
}

// One that gives as many channels and pixels as it takes, before it pools.
inline conv::Block same_size(Random& random, int channels, int height, int width) {
  conv::Block b = linear(channels, height, width, channels);
  const int wide = random.coin();
  for (int axis = 0; axis < 2; ++axis) b.kernel[axis] = 1 + 2 * wide, b.padding[axis] = wide;
  draw_rest(random, b);
  return b;
}

// Appends a block, or two and their sum, that read the last output, or the data.
inline void append(Random& random, std::vector<conv::Block>& blocks, int channels, int height,
                   int width) {
  const int from = int(blocks.size()) - 1;
  const auto push = [&](conv::Block b, int from, int plus) {
    b.from = from, b.plus = plus;
    blocks.push_back(b);
    return int(blocks.size()) - 1;
  };
  switch (from < 0 ? random.of<int>({0, 3}) : random.below(4)) {
    case 0:
      push(block(random, channels, height, width), from, conv::kNone);
      return;
    case 1:  // x + f(x)
      push(same_size(random, channels, height, width), from, from);
      return;
    case 2: {  // x + g(f(x))
      conv::Block b = same_size(random, channels, height, width);
      b.window[0] = b.window[1] = 1, b.choice = nullptr;
      const int last = push(b, from, conv::kNone);
      push(same_size(random, channels, height, width), last, from);
      return;
    }
    default: {  // f(x) + g(x)
      conv::Block b = block(random, channels, height, width);
      conv::Block other = b;
      other.window[0] = other.window[1] = 1, other.choice = nullptr;
      other.below = random.of<double>({0.2, 1});
      draw_norm(random, other);
      const int last = push(other, from, conv::kNone);
      push(b, from, last);
    }
  }
}

inline void draw_tensors(Random& random, conv::Block& b, bool adapts) {
  b.has[kWeight] = true;
  b.has[kBias] = random.coin();
  b.has[kScale] = b.norm != Norm::none && random.coin();
  b.has[kShift] = b.norm != Norm::none && random.coin();
  for (int i = 0; i < kTensors; ++i) b.adapts[i] = adapts && b.has[i] && random.below(4) > 0;
}

inline std::vector<conv::Block> draw_blocks(Random& random, int depth) {
  std::vector<conv::Block> blocks;
  int channels = random.of<int>({1, 3, 16}), sides[2];
  for (int& size : sides) size = random.of<int>({4, 7, 8, 13, 15});
  for (int i = 0; i < depth; ++i) {
    append(random, blocks, channels, sides[0], sides[1]);
    conv::Block& b = blocks.back();
    if (i == depth - 1) b.mean = random.coin();
    channels = b.filters, sides[0] = side(b, 0), sides[1] = side(b, 1);
  }
  blocks.push_back(linear(channels, sides[0], sides[1], 3));
  blocks.back().from = int(blocks.size()) - 2;
  const int frozen = random.coin() ? random.below(int(blocks.size())) : 0;
  for (int l = 0; l < int(blocks.size()); ++l) draw_tensors(random, blocks[l], l >= frozen);
  return blocks;
}

}  // namespace fastmeta::tests
