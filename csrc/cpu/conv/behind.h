// What stands behind a block's norm, sum and maximum: an expression of each number, and the mean over
// the image. With z its input, f the expression:
// dz = f'(z) dy, y' = f'(z) z', dz' = f'(z) dy' + f''(z) dy z'.
#pragma once

#include "expressed.h"
#include "mean.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T>
class Behind {
 public:
  Behind(const fastmeta::conv::Block& block, const Shape& shape, int64_t examples, T* workspace)
      : b(block), s(shape), examples(examples), size(examples * s.out_pixels() * s.out),
        workspace(workspace),
        field{s.rows, s.cols, s.out_rows, s.out_cols, s.out, {b.window[0], b.window[1]}} {}

  // From z, in its place, to value and output.
  void forward(const Kept& kept) const {
    if (b.program) {
      const Program& program = kept.curve >= 0 ? *b.program : *b.short_program;
      const int64_t offsets[] = {kept.value, kept.value, kept.slope, kept.curve};
      express(program, workspace, offsets, size, s, b.filters);
    }
    if (b.mean) average(field, examples, at(kept.value), at(kept.output));
  }

  // From the derivative by the output to that by z, in the place of that by the value.
  void backward(const Kept& kept) const {
    if (b.mean) spread(field, examples, at(kept.output_delta), at(kept.delta));
    if (!b.program) return;
    T* const delta = at(kept.delta);
    if (kept.curve >= 0) each([&](int64_t i) { scale(at(kept.curve) + i, load(delta + i)); });
    each([&](int64_t i) { scale(delta + i, load(at(kept.slope) + i)); });
  }

  // From the tangent of z, in its place, to that of the output.
  void tangent_forward(const Kept& kept, const Moving& r) const {
    if (b.program) {
      each([&](int64_t i) {
        const Num<T> rz = load(at(r.value) + i);
        store(at(r.bent) + i, load(at(kept.curve) + i) * rz);
        store(at(r.value) + i, load(at(kept.slope) + i) * rz);
      });
    }
    if (b.mean) average(field, examples, at(r.value), at(r.output));
  }

  // From the tangent of the derivative by the output to that of the one by z.
  void tangent_backward(const Kept& kept, const Moving& r) const {
    if (b.mean) spread(field, examples, at(r.output_delta), at(r.delta));
    if (!b.program) return;
    each([&](int64_t i) {
      T* const delta = at(r.delta) + i;
      store(delta, load(at(kept.slope) + i) * load(delta) + load(at(r.bent) + i));
    });
  }

 private:
  const fastmeta::conv::Block& b;
  const Shape& s;
  const int64_t examples, size;
  T* const workspace;
  const Field field;

  T* at(int64_t offset) const { return workspace + offset; }
  template <class Use>
  void each(Use use) const {
    for (int64_t i = 0; i < size; i += lanes<T>) use(i);
  }
  static void scale(T* to, Num<T> factor) { store(to, load(to) * factor); }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
