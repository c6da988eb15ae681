// The block that reads the data. Its convolution's output is never stored: the input does not move,
// so that the norm's statistics follow from mean and covariance of the patches that pixels read,
// and its gradients from one sum of derivatives times patches. Equations: docs/design.md.
#pragma once

#include "choice.h"
#include "convolution.h"
#include "patches.h"
#include "tensors.h"

namespace fastmeta::FASTMETA_NAMESPACE::conv {

template <class T>
class FirstBlock {
 public:
  FirstBlock(const fastmeta::conv::Block& block, const Shape& shape, const Layout& layout,
             const T* shared, T* workspace)
      : b(block), s(shape), layout(layout), given(shared + shape.given), workspace(workspace),
        field{s.rows, s.cols, s.out_rows, s.out_cols, s.out, {b.window[0], b.window[1]}},
        convolution(shape, 1,
                    {workspace + layout.panel, workspace + layout.planes,
                     reinterpret_cast<Term<T>*>(workspace + layout.terms), workspace + layout.zero}),
        depth(s.depth()), moves(block.norm == Norm::batch) {}

  // Mean [depth] and covariance [depth, depth] of the patches of a set; weights don't move them.
  void measure(const T* x, int64_t examples, int64_t measured) const {
    if (!moves) return;
    const Patches<T> patches(s, layout, b.height + 2 * b.padding[0], b.width + 2 * b.padding[1],
                             workspace);
    patches.measure(x, examples, doubles(measured), doubles(measured) + depth);
  }

  // x [examples, height, width, in] to statistics, code, value and output.
  void forward(const T* x, const Kept& kept, const Tensors<T>& at,
               int64_t examples) const {
    T *const centre = workspace + kept.statistics, *const inverse = centre + s.out;
    if (moves) {
      project(kept.measured, at.of[kWeight], centre);
      spread_covariance(kept.measured, at.of[kWeight], of_weight(), at.of[kWeight], inverse);
    }
    for_channels([&](int c) {
      if (moves) {
        // Rounding may leave less than nothing.
        const Num<T> variance = select(load(inverse + c) < Num<T>{}, Num<T>{}, load(inverse + c));
        store(inverse + c, T(1) / sqrt(variance + T(b.eps)));
      } else {
        const bool running = b.norm == Norm::running;
        const Num<T> bias = at.of[kBias] ? load(at.of[kBias] + c) : Num<T>{};
        store(centre + c, (running ? load(given + c) : Num<T>{}) - bias);
        store(inverse + c, running ? load(given + s.out + c) : all(T(1)));
      }
      const Num<T> factor = load(at.of[kScale] + c) * load(inverse + c);
      store(constant() + c, load(at.of[kShift] + c) - factor * load(centre + c));
      for_taps(c, [&](int64_t k) { store(folded() + k, factor * load(at.of[kWeight] + k)); });
    });
    for_strips(examples, [&](const Field& part, int64_t first, int pixels, int64_t place) {
      convolution.forward_rows(x, folded(), first / s.cols, part.rows, strip());
      T *const value = workspace + kept.value + place, *const code = workspace + kept.code + place;
      if (b.choice == nullptr) {
        return run_pass(part, 0, 1,
                        Choose<T>{{part, T(b.below)}, strip(), constant(), value, code});
      }
      for (int64_t i = 0; i < int64_t(pixels) * s.out; i += s.out) {
        for_channels([&](int c) { store(strip() + i + c, load(strip() + i + c) + load(constant() + c)); });
      }
      choose(b, s, part, 1, workspace, layout.strip, layout.choices, workspace + layout.zero, value,
             code);
    });
  }

  // From the derivative by the output: adds to `gradient`, and keeps what its tangent needs.
  void backward(const T* x, const Kept& kept, const Tensors<T>& at, int64_t examples,
                T* gradient) const {
    T *const sums = workspace + kept.statistics + 2 * s.out, *const g = workspace + kept.patch_sums;
    add_up(x, kept, kept.delta, examples, sums, g);
    const T *const centre = workspace + kept.statistics, *const inverse = centre + s.out;
    if (moves) spread_covariance(kept.measured, at.of[kWeight], of_weight());
    along(at.of[kWeight], g, sums + s.out);
    for_channels([&](int c) {
      const Num<T> n = load(inverse + c), sum = load(sums + c);
      const Num<T> dot = n * (load(sums + s.out + c) - apart(centre, c) * sum);
      store(sums + s.out + c, dot);
      const Num<T> factor = load(at.of[kScale] + c) * n;
      for_taps(c, [&](int64_t k) {
        const Num<T> pull = moves ? dot * n * load(of_weight() + k) : Num<T>{};
        add(gradient, kWeight, k, factor * (load(g + k) - pull));
      });
      add(gradient, kScale, c, dot);
      add(gradient, kShift, c, sum);
      if (!moves) add(gradient, kBias, c, factor * sum);
    });
  }

  // The tangent of the output along v.
  void tangent_forward(const T* x, const Kept& kept, const Moving& r, const Tensors<T>& at,
                       const Tensors<T>& v, int64_t examples) const {
    const T *const centre = workspace + kept.statistics, *const inverse = centre + s.out;
    T *const r_centre = workspace + r.sums, *const r_inverse = r_centre + s.out;
    if (moves) {
      project(kept.measured, v.of[kWeight], r_centre);
      spread_covariance(kept.measured, v.of[kWeight], of_vector(), at.of[kWeight], r_inverse);
    }
    for_channels([&](int c) {
      const Num<T> n = load(inverse + c), scale = load(at.of[kScale] + c);
      const Num<T> bias = v.of[kBias] ? load(v.of[kBias] + c) : Num<T>{};
      if (!moves) store(r_centre + c, -bias);
      // inverse' / inverse
      const Num<T> ratio = moves ? -n * n * load(r_inverse + c) : Num<T>{};
      store(r_inverse + c, ratio);
      const Num<T> rn = ratio * n;
      const Num<T> factor = scale * n, r_factor = load(v.of[kScale] + c) * n + scale * rn;
      store(constant() + c, load(v.of[kShift] + c) - r_factor * load(centre + c) -
                                factor * load(r_centre + c));
      for_taps(c, [&](int64_t k) {
        store(folded() + k,
              factor * load(v.of[kWeight] + k) + r_factor * load(at.of[kWeight] + k));
      });
    });
    for_strips(examples, [&](const Field& part, int64_t first, int, int64_t place) {
      convolution.forward_rows(x, folded(), first / s.cols, part.rows, strip());
      run_pass(part, 0, 1,
               TangentOfChoice<T>{{part, T(b.below)}, strip(), constant(),
                                  workspace + kept.code + place, workspace + r.value + place});
    });
  }

  // From the tangent of the derivative by the output: adds to `gradient`.
  void tangent_backward(const T* x, const Kept& kept, const Moving& r, const Tensors<T>& at,
                        const Tensors<T>& v, int64_t examples, T* gradient) const {
    T *const r_sums = workspace + r.sums + 2 * s.out, *const r_dot = r_sums + s.out;
    add_up(x, kept, r.delta, examples, r_sums, moving());
    const T *const centre = workspace + kept.statistics, *const inverse = centre + s.out;
    const T *const sums = inverse + s.out, *const dots = sums + s.out;
    const T *const r_centre = workspace + r.sums, *const r_inverse = r_centre + s.out;
    const T* const g = workspace + kept.patch_sums;
    if (moves) {
      spread_covariance(kept.measured, at.of[kWeight], of_weight());
      spread_covariance(kept.measured, v.of[kWeight], of_vector());
    }
    along(v.of[kWeight], g, folded());
    along(at.of[kWeight], moving(), r_dot);
    for_channels([&](int c) {
      const Num<T> n = load(inverse + c), ratio = load(r_inverse + c), rn = ratio * n;
      const Num<T> scale = load(at.of[kScale] + c);
      const Num<T> sum = load(sums + c), r_sum = load(r_sums + c), dot = load(dots + c);
      const Num<T> moved = load(folded() + c) - apart(r_centre, c) * sum + load(r_dot + c) -
                           apart(centre, c) * r_sum;
      const Num<T> rd = ratio * dot + n * moved;
      const Num<T> factor = scale * n, r_factor = load(v.of[kScale] + c) * n + scale * rn;
      for_taps(c, [&](int64_t k) {
        Num<T> still = load(g + k), moving_part = load(moving() + k);
        if (moves) {
          const Num<T> of_w = load(of_weight() + k), of_v = load(of_vector() + k);
          still -= dot * n * of_w;
          moving_part -= (rd * n + dot * rn) * of_w + dot * n * of_v;
        }
        add(gradient, kWeight, k, r_factor * still + factor * moving_part);
      });
      add(gradient, kScale, c, rd);
      add(gradient, kShift, c, r_sum);
      if (!moves) add(gradient, kBias, c, r_factor * sum + factor * r_sum);
    });
  }

 private:
  const fastmeta::conv::Block& b;
  const Shape& s;
  const Layout& layout;
  const T* given;
  T* workspace;
  const Field field;
  const Convolution<T> convolution;
  const int depth;
  const bool moves;  // whether the statistics do, with the weight

  // Scratch: a row, then what is as large as the weight.
  T* strip() const { return workspace + layout.strip; }
  T* constant() const { return workspace + layout.first; }
  T* folded() const { return constant() + s.out; }
  T* of_weight() const { return folded() + int64_t(depth) * s.out; }
  T* of_vector() const { return of_weight() + int64_t(depth) * s.out; }
  T* moving() const { return of_vector() + int64_t(depth) * s.out; }

  template <class Use>
  void for_channels(Use use) const {
    for (int c = 0; c < s.out; c += lanes<T>) use(c);
  }
  // use(offset in a weight) of each tap of these channels
  template <class Use>
  void for_taps(int c, Use use) const {
    for (int k = 0; k < depth; ++k) use(int64_t(k) * s.out + c);
  }
  void add(T* gradient, Tensor which, int64_t at, Num<T> more) const {
    if (!b.has[which]) return;
    T* const to = gradient + s.of[which] + at;
    store(to, load(to) + more);
  }
  // Where patches are not centred, the mean that the product lacks.
  Num<T> apart(const T* centre, int c) const { return moves ? Num<T>{} : load(centre + c); }

  double* doubles(int64_t offset) const { return reinterpret_cast<double*>(workspace + offset); }

  // to [out] = weights [depth, out] along the patches' mean
  void project(int64_t measured, const T* weight, T* to) const {
    const double* const mean = doubles(measured);
    for_channels([&](int c) {
      double sums[lanes<T>] = {};
      for (int k = 0; k < depth; ++k) add_to(sums, mean[k], weight + int64_t(k) * s.out + c);
      for (int l = 0; l < lanes<T>; ++l) to[c + l] = T(sums[l]);
    });
  }
  // to [depth, out] = the patches' covariance times weights
  void spread_covariance(int64_t measured, const T* weight, T* to) const {
    spread_covariance(measured, weight, to, nullptr, nullptr);
  }
  // And result [out] = the sums over taps of that, before it is rounded, times `other`.
  void spread_covariance(int64_t measured, const T* weight, T* to, const T* other,
                         T* result) const {
    const double* const covariance = doubles(measured) + depth;
    for_channels([&](int c) {
      double along_other[lanes<T>] = {};
      for (int k = 0; k < depth; ++k) {
        const double* const row = covariance + int64_t(k) * depth;
        const int64_t at = int64_t(k) * s.out + c;
        double sums[lanes<T>] = {};
        for (int j = 0; j < depth; ++j) add_to(sums, row[j], weight + int64_t(j) * s.out + c);
        for (int l = 0; l < lanes<T>; ++l) {
          to[at + l] = T(sums[l]);
          if (other) along_other[l] += sums[l] * other[at + l];
        }
      }
      for (int l = 0; other && l < lanes<T>; ++l) result[c + l] = T(along_other[l]);
    });
  }
  static void add_to(double* sums, double factor, const T* from) {
    for (int l = 0; l < lanes<T>; ++l) sums[l] += factor * from[l];
  }
  // to [out] = the sums over taps of products of [depth, out]
  void along(const T* one, const T* other, T* to) const {
    for_channels([&](int c) {
      Num<T> sum{};
      for_taps(c, [&](int64_t k) { sum += load(one + k) * load(other + k); });
      store(to + c, sum);
    });
  }

  // sums [out] and g [depth, out] = derivatives over the pixels, alone and times the patches, which
  // are centred where statistics move.
  void add_up(const T* x, const Kept& kept, int64_t delta, int64_t examples, T* sums,
              T* g) const {
    conv::clear(sums, s.out);
    conv::clear(g, int64_t(depth) * s.out);
    for_strips(examples, [&](const Field& part, int64_t first, int, int64_t place) {
      run_pass(part, 0, 1,
               Scatter<T>{{part, T(b.below)}, workspace + kept.code + place, workspace + delta + place,
                          strip(), sums});
      convolution.add_rows(x, first / s.cols, part.rows, strip(), g);
    });
    if (!moves) return;
    const double* const mean = doubles(kept.measured);
    for_channels([&](int c) {
      const Num<T> sum = load(sums + c);
      for (int k = 0; k < depth; ++k) {
        T* const to = g + int64_t(k) * s.out + c;
        store(to, load(to) - T(mean[k]) * sum);
      }
    });
  }

  // use(field, first pixel, pixels, place of the values) of as many rows as stay in the first cache
  template <class Use>
  void for_strips(int64_t examples, Use use) const {
    const int covered = s.out_rows * b.window[0];
    for (int64_t n = 0; n < examples; ++n) {
      for (int y = 0; y < s.rows;) {
        const int next = y + layout.strip_rows < covered ? y + layout.strip_rows : s.rows;
        const Field part{next - y, s.cols, (next - y) / b.window[0], s.out_cols, s.out,
                         {b.window[0], b.window[1]}};
        use(part, (n * s.rows + y) * s.cols, part.rows * s.cols,
            (n * s.out_rows + y / b.window[0]) * s.out_cols * s.out);
        y = next;
      }
    }
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE::conv
