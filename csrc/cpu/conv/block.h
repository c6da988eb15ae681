// A convolutional block of one task: its four rules, over convolution kernels and single passes.
#pragma once

#include "layout.h"
#include "choice.h"
#include "convolution.h"
#include "moments.h"
#include "passes.h"
#include "tangent_passes.h"
#include "tensors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

using fastmeta::conv::kChunk;
using fastmeta::conv::kNone;

template <class T>
class Block {
 public:
  Block(const fastmeta::conv::Block& block, const Shape& shape, const Layout& layout,
        int64_t examples, const T* shared, T* workspace)
      : b(block), s(shape), layout(layout), examples(examples), given(shared + shape.given),
        workspace(workspace),
        field{s.rows, s.cols, s.out_rows, s.out_cols, s.out, {b.window[0], b.window[1]}},
        convolution(shape, examples,
                    {workspace + layout.panel, workspace + layout.planes,
                     reinterpret_cast<Term<T>*>(workspace + layout.terms), workspace + layout.zero}) {}

  // x [examples, height, width, in] to product, statistics, value and output. `plus` is what the
  // block adds.
  void forward(const Read<T>& x, const Read<T>& plus, const Kept& kept, const Tensors<T>& at) {
    T *const mean = workspace + kept.statistics, *const inverse = mean + s.out;
    const Operand<T> operand{x.value, convolution.prepared(at.of[kWeight], buffer(0))};
    T* const product = workspace + kept.product;
    if (b.norm == Norm::batch) {  // which takes any bias away
      Moments<T> moments(mean, inverse, s.out);
      convolution.forward(&operand, 1, examples, product,
                          [&](T* const* rows, int live) { moments.add(rows, live); });
      moments.finish(T(b.eps));
    } else {
      convolution.forward(&operand, 1, examples, product,
                          [&](T* const* rows, int live) { add_row(bias(at), rows, live); });
      fix_statistics(mean, inverse);
    }
    with_added(plus, [&](auto added) {
      const PassBase<T, decltype(added)> rule = base(kept, at, added);
      if (b.choice) return choose_by_expression(rule, kept);
      run_pass(field, 0, examples,
               Forward<T, decltype(added)>{rule, product, workspace + kept.value});
    });
  }

  // From the derivative by the output: adds to `gradient`, leaves that by the product at `result`,
  // which may be where the product is, and gives those by x and by what is added (in the place of
  // these, where nothing reads them any more).
  void backward(const Read<T>& x, const Read<T>& plus, const Kept& kept, const Tensors<T>& at,
                int64_t result, T* gradient) {
    T* const sums = workspace + kept.statistics + 2 * s.out;
    conv::clear(sums, 2 * s.out);
    with_added(plus, [&](auto added) {
      run_pass(field, 0, examples,
               BackwardSums<T, decltype(added)>{base(kept, at, added), workspace + kept.product,
                                                workspace + kept.delta, sums});
    });
    const Pull<T> pull = shares(sums, 0);
    const T* const back = x.delta ? prepared_back(at, 0) : nullptr;
    convolution.start(weight_sums());
    for_chunks([&](int64_t first, int64_t last) {
      with_added(plus, [&](auto added) {
        run_pass(field, first, last,
                 Backward<T, decltype(added)>{base(kept, at, added), workspace + kept.product,
                                              workspace + kept.delta, pull, workspace + result});
      });
      add_weight_gradient(x.value, workspace + result, first, last, gradient);
      const Operand<T> operand{workspace + result + first * s.product_size(), back};
      give(x, &operand, 1, first, last);
    });
    convolution.finish(weight_sums(), tensor(gradient, kWeight));
    add_row_gradients(kept, at, gradient);
  }

  // x, what is added, and their tangents to those of product and output along v.
  void tangent_forward(const Read<T>& x, const Read<T>& plus, const Kept& kept, const Moving& r,
                       const Tensors<T>& at, const Tensors<T>& v) {
    const Operand<T> operands[2] = {
        {x.value, convolution.prepared(v.of[kWeight], buffer(0))},
        {x.tangent, x.tangent ? convolution.prepared(at.of[kWeight], buffer(1)) : nullptr}};
    convolution.forward(operands, x.tangent ? 2 : 1, examples, workspace + r.product,
                        [&](T* const* rows, int live) { add_row(bias(v), rows, live); });
    T* const sums = workspace + r.sums;
    conv::clear(sums, 2 * s.out);
    if (b.norm == Norm::batch) add_sums(kept, workspace + r.product, sums);
    with_added(plus, [&](auto added) {
      run_pass(field, 0, examples,
               TangentForward<T, decltype(added)>{moved(kept, r, at, v, added), workspace + r.value});
    });
  }

  // From the tangent of the derivative by the output: adds to `gradient`, and gives those by x and
  // by what is added.
  void tangent_backward(const Read<T>& x, const Read<T>& plus, const Kept& kept, const Moving& r,
                        const Tensors<T>& at, const Tensors<T>& v, T* gradient) {
    const T *const delta = workspace + kept.delta, *const r_delta = workspace + r.delta;
    T* const sums = workspace + r.sums + 2 * s.out;
    conv::clear(sums, 2 * s.out);
    with_added(plus, [&](auto added) {
      run_pass(field, 0, examples,
               TangentSums<T, decltype(added)>{moved(kept, r, at, v, added), delta, r_delta, sums});
    });
    const T* const old = workspace + kept.statistics + 2 * s.out;
    const Pull<T> of_delta = shares(old, 1), of_r_delta = shares(sums, 2);
    const T* const back = x.delta ? prepared_back(at, 0) : nullptr;
    const T* const v_back = x.delta ? prepared_back(v, 1) : nullptr;
    convolution.start(weight_sums());
    const T* const before = workspace + kept.product_delta;
    for_chunks([&](int64_t first, int64_t last) {
      with_added(plus, [&](auto added) {
        run_pass(field, first, last,
                 TangentBackward<T, decltype(added)>{moved(kept, r, at, v, added), delta, r_delta,
                                                     of_delta, of_r_delta, workspace + r.product});
      });
      add_weight_gradient(x.value, workspace + r.product, first, last, gradient);
      if (x.tangent) add_weight_gradient(x.tangent, before, first, last, gradient);
      const int64_t at = first * s.product_size();
      const Operand<T> operands[2] = {{workspace + r.product + at, back}, {before + at, v_back}};
      give(x, operands, 2, first, last);
    });
    convolution.finish(weight_sums(), tensor(gradient, kWeight));
    add(T(1), sums + s.out, tensor(gradient, kScale));
    add(T(1), sums, tensor(gradient, kShift));
    if (!b.has[kBias] || b.norm == Norm::batch) return;
    const T* const inverse = workspace + kept.statistics + s.out;
    for (int c = 0; c < s.out; ++c) {
      tensor(gradient, kBias)[c] +=
          inverse[c] * (v.of[kScale][c] * old[c] + at.of[kScale][c] * sums[c]);
    }
  }

 private:
  const fastmeta::conv::Block& b;
  const Shape& s;
  const Layout& layout;
  const int64_t examples;
  const T* given;
  T* workspace;
  const Field field;
  const Convolution<T> convolution;

  T* buffer(int slot) const { return workspace + layout.prepared[slot]; }
  T* weight_sums() const { return workspace + layout.weight_sums; }
  const T* prepared_back(const Tensors<T>& of, int slot) const {
    return convolution.prepared_back(of.of[kWeight], workspace + layout.transposed[slot], buffer(slot));
  }
  T* tensor(T* block, Tensor which) const { return b.has[which] ? block + s.of[which] : nullptr; }

  // use(added): passes are compiled apart for blocks that add nothing, which read nothing more.
  template <class Use>
  void with_added(const Read<T>& plus, Use use) const {
    if (b.plus == kNone) return use(Nothing<T>{});
    use(plus);
  }
  template <class Added>
  PassBase<T, Added> base(const Kept& kept, const Tensors<T>& at, const Added& added) const {
    const T* const mean = workspace + kept.statistics;
    return {field, {mean, mean + s.out, at.of[kScale], at.of[kShift], T(b.below)}, added,
            b.choice ? workspace + kept.code : nullptr};
  }
  template <class Added>
  Moved<T, Added> moved(const Kept& kept, const Moving& r, const Tensors<T>& at,
                        const Tensors<T>& v, const Added& added) const {
    return {base(kept, at, added), workspace + kept.product, workspace + r.product,
            shares(workspace + r.sums, 3), v.of[kScale], v.of[kShift]};
  }

  // The value as above, of the pixels where an expression of it is greatest, and which these are.
  template <class Added>
  void choose_by_expression(const PassBase<T, Added>& rule, const Kept& kept) const {
    const Field pixels{s.rows, s.cols, s.rows, s.cols, s.out, {1, 1}};
    const PassBase<T, Added> of_pixels{pixels, rule.rule, rule.added, nullptr};
    const int64_t image = s.product_size(), out_image = int64_t(s.out_pixels()) * s.out;
    for_chunks([&](int64_t first, int64_t last) {
      T* const z = workspace + layout.arguments - first * image;  // as if for all images
      run_pass(pixels, first, last, Forward<T, Added>{of_pixels, workspace + kept.product, z});
      choose(b, s, field, last - first, workspace, layout.arguments, layout.choices,
             workspace + layout.zero, workspace + kept.value + first * out_image,
             workspace + kept.code + first * out_image);
    });
  }

  // The adjoint of some images' derivatives, to where those by x are asked for.
  void give(const Read<T>& x, const Operand<T>* operands, int count, int64_t first,
            int64_t last) const {
    if (x.delta == nullptr) return;
    T *const to = x.delta + first * s.input_size(), *const part = workspace + layout.part;
    convolution.backward(operands, count, last - first, x.adds ? part : to);
    for (int64_t i = 0; x.adds && i < (last - first) * s.input_size(); i += lanes<T>) {
      store(to + i, load(to + i) + load(part + i));
    }
  }

  // A bias goes with the mean that is taken away.
  const T* bias(const Tensors<T>& at) const {
    return b.norm == Norm::batch ? nullptr : at.of[kBias];
  }

  void fix_statistics(T* mean, T* inverse) const {
    for (int c = 0; c < s.out; ++c) {
      mean[c] = b.norm == Norm::running ? given[c] : T(0);
      inverse[c] = b.norm == Norm::running ? given[s.out + c] : T(1);
    }
  }

  void add_row_gradients(const Kept& kept, const Tensors<T>& at, T* gradient) const {
    const T *const inverse = workspace + kept.statistics + s.out, *const sums = inverse + s.out;
    add(T(1), sums + s.out, tensor(gradient, kScale));
    add(T(1), sums, tensor(gradient, kShift));
    if (!b.has[kBias] || b.norm == Norm::batch) return;
    for (int c = 0; c < s.out; ++c) {
      tensor(gradient, kBias)[c] += at.of[kScale][c] * inverse[c] * sums[c];
    }
  }

  // Of sums [2, out] over all pixels what each pixel bears; nothing where statistics don't move.
  Pull<T> shares(const T* sums, int slot) const {
    T* const pulls = workspace + layout.pulls + 2 * slot * s.out;
    const T share = T(1) / T(examples * s.pixels());
    for (int c = 0; c < 2 * s.out; ++c) pulls[c] = b.norm == Norm::batch ? share * sums[c] : T(0);
    return {pulls, pulls + s.out};
  }

  template <class Use>
  void for_chunks(Use use) const {
    int64_t most = kChunk / s.product_size() > 1 ? kChunk / s.product_size() : 1;
    if (most > kTileRows) most -= most % kTileRows;
    for (int64_t first = 0; first < examples; first += most) {
      use(first, first + most < examples ? first + most : examples);
    }
  }

  void add_weight_gradient(const T* x, const T* derivative, int64_t first, int64_t last,
                           T* gradient) const {
    convolution.add(x + first * s.input_size(), derivative + first * s.product_size(), last - first,
                    weight_sums(), tensor(gradient, kWeight));
  }

  void add_row(const T* row, T* const* rows, int live) const {
    for (int i = 0; row != nullptr && i < live; ++i) add(T(1), row, rows[i]);
  }
  void add(T w, const T* row, T* to) const {
    for (int c = 0; to != nullptr && c < s.out; c += lanes<T>) {
      store(to + c, load(to + c) + w * load(row + c));
    }
  }

  // sums += those of the tangent of the product, and of n times that
  void add_sums(const Kept& kept, const T* moving, T* sums) const {
    const T *const product = workspace + kept.product, *const mean = workspace + kept.statistics;
    const int64_t pixels = examples * s.pixels();
    constexpr int64_t kRow = 32;
    for (int64_t first = 0; first < pixels; first += kRow) {
      const int64_t last = first + kRow < pixels ? first + kRow : pixels;
      for (int c = 0; c < s.out; c += lanes<T>) {
        const Num<T> centre = load(mean + c), inverse = load(mean + s.out + c);
        Num<T> plain{}, along{};
        for (int64_t p = first; p < last; ++p) {
          const Num<T> ru = load(moving + p * s.out + c);
          plain += ru;
          along += (load(product + p * s.out + c) - centre) * ru;
        }
        store(sums + c, load(sums + c) + plain);
        store(sums + s.out + c, load(sums + s.out + c) + along * inverse);
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
