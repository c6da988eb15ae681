// The blocks of a network over a set of examples: their four rules, one block after another. A pass
// goes through the body or through what is behind it.
#pragma once

#include "behind.h"
#include "block.h"
#include "first_block.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::kData;

// Some blocks, and what they are run on: the data as laid out, and where everything is kept.
template <class T>
struct Part {
  int first, last;
  const T* x;
  const Kept* kept;
  int64_t examples;
};

template <class T>
class Blocks {
 public:
  // `shared`: parameters as they are packed, which hold the given statistics.
  Blocks(const Network& network, const Layout& layout, const T* shared, T* workspace)
      : n(network), layout(layout), shared(shared), workspace(workspace) {}

  // `theta`, here and below: a block of parameters.
  void forward(const Part<T>& part, const T* theta) const {
    for (int l = part.first; l < part.last; ++l) {
      const Tensors<T> at = tensors(l, theta, layout.one);
      if (l == layout.patched) {
        patched().forward(part.x, part.kept[l], at, part.examples);
      } else {
        block(l, part).forward(value(part, n.blocks[l].from), value(part, n.blocks[l].plus),
                               part.kept[l], at);
      }
      behind(l, part).forward(part.kept[l]);
    }
  }

  // From the derivative by the last output: adds to `gradient`, and to the body's sums if asked.
  // `in_place`: derivatives by products go where these are.
  void backward(const Part<T>& part, const T* theta, bool in_place, T* gradient,
                bool to_body) const {
    const auto read = [&](int source, bool adds) {
      Read<T> found = value(part, source);
      if (source == kData || (ends_body(source) && !to_body)) return found;
      found.delta = workspace + part.kept[source].output_delta, found.adds = adds;
      return found;
    };
    for (int l = part.last - 1; l >= part.first; --l) {
      const Tensors<T> at = tensors(l, theta, layout.one);
      const Kept& kept = part.kept[l];
      behind(l, part).backward(kept);
      if (l == layout.patched) {
        patched().backward(part.x, kept, at, part.examples, gradient);
        continue;
      }
      const int64_t result = in_place ? kept.product
                             : kept.product_delta >= 0 ? kept.product_delta
                                                       : layout.product_delta;
      const Shape& s = layout.shapes[l];
      block(l, part).backward(read(n.blocks[l].from, s.from_adds),
                              read(n.blocks[l].plus, s.plus_adds), kept, at, result, gradient);
    }
  }

  // To the tangent of the last output along a block of tangents.
  void tangent_forward(const Part<T>& part, const T* theta, const T* vector) const {
    for (int l = part.first; l < part.last; ++l) {
      const Tensors<T> at = tensors(l, theta, layout.one), v = tensors(l, vector, layout.zero);
      const Kept& kept = part.kept[l];
      const Moving& r = layout.moving[l];
      if (l == layout.patched) {
        patched().tangent_forward(part.x, kept, r, at, v, part.examples);
      } else {
        block(l, part).tangent_forward(moving(part, n.blocks[l].from),
                                       moving(part, n.blocks[l].plus), kept, r, at, v);
      }
      behind(l, part).tangent_forward(kept, r);
    }
  }

  // From the tangent of the derivative by the last output: adds to `gradient`, and to the body's
  // sums.
  void tangent_backward(const Part<T>& part, const T* theta, const T* vector, T* gradient) const {
    const auto read = [&](int source, bool adds) {
      Read<T> found = moving(part, source);
      if (source == kData) return found;
      found.delta = workspace + (ends_body(source) ? part.kept[source].output_delta
                                                 : layout.moving[source].output_delta);
      found.adds = adds;
      return found;
    };
    for (int l = part.last - 1; l >= part.first; --l) {
      const Tensors<T> at = tensors(l, theta, layout.one), v = tensors(l, vector, layout.zero);
      const Kept& kept = part.kept[l];
      const Moving& r = layout.moving[l];
      behind(l, part).tangent_backward(kept, r);
      if (l == layout.patched) {
        patched().tangent_backward(part.x, kept, r, at, v, part.examples, gradient);
        continue;
      }
      const Shape& s = layout.shapes[l];
      block(l, part).tangent_backward(read(n.blocks[l].from, s.from_adds),
                                      read(n.blocks[l].plus, s.plus_adds), kept, r, at, v,
                                      gradient);
    }
  }

  // Of the block that goes by patches.
  void measure(const Part<T>& part) const {
    if (layout.patched == kNone) return;
    patched().measure(part.x, part.examples, part.kept[layout.patched].measured);
  }

 private:
  const Network& n;
  const Layout& layout;
  const T* const shared;
  T* const workspace;

  Block<T> block(int l, const Part<T>& part) const {
    return {n.blocks[l], layout.shapes[l], layout, part.examples, shared, workspace};
  }
  Behind<T> behind(int l, const Part<T>& part) const {
    return {n.blocks[l], layout.shapes[l], part.examples, workspace};
  }
  FirstBlock<T> patched() const {
    const int l = layout.patched;
    return {n.blocks[l], layout.shapes[l], layout, shared, workspace};
  }
  bool ends_body(int source) const { return source == layout.body - 1; }
  // What lies at `source`: kData and kNone are the same number, of which only the one is looked at.
  Read<T> value(const Part<T>& part, int source) const {
    return {source == kData ? part.x : workspace + part.kept[source].output};
  }
  Read<T> moving(const Part<T>& part, int source) const {
    Read<T> found = value(part, source);
    if (source >= layout.body) found.tangent = workspace + layout.moving[source].output;
    return found;
  }
  // A block's tensors; `scale` in place of a scale that it lacks.
  Tensors<T> tensors(int l, const T* from, int64_t scale) const {
    const fastmeta::conv::Block& b = n.blocks[l];
    const int64_t* of = layout.shapes[l].of;
    return {{from + of[kWeight], b.has[kBias] ? from + of[kBias] : nullptr,
             b.has[kScale] ? from + of[kScale] : workspace + scale,
             b.has[kShift] ? from + of[kShift] : workspace + layout.zero}};
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
