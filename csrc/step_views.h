// One task's step: the network, its layout, the data, and where each matrix is found.
#pragma once

#include "dense.h"
#include "dual.h"
#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

// use(layer whose output it reads, whether that is added to its product, whether the derivative is
// added to that of other readers). In a chain it is the layer before alone.
template <class E, class Use>
FASTMETA_DEVICE void for_each_read(const Dense& layer, Use use) {
  use(layer.from, false, E::takes_graphs && layer.adds_from);
  if constexpr (E::takes_graphs) {
    if (layer.plus != kNone) use(layer.plus, true, layer.adds_plus);
  }
}

// Of sets that go in chunks: the same storage as each part of the chunks sees it, and which chunk is at
// hand. An engine that knows none holds nothing of it.
template <class Layout, bool is_known>
struct Chunked {
  const Layout* parts = nullptr;
  int chunk = 0;
  FASTMETA_DEVICE static int chunks(const Options& network) {
    return network.chunks(network.support);
  }
};
template <class Layout>
struct Chunked<Layout, false> {
  static constexpr const Layout* parts = nullptr;
  static constexpr int chunk = 0;
  FASTMETA_DEVICE static constexpr int chunks(const Options&) { return 1; }
};

template <class E>
struct Step {
  using S = typename E::Scalar;
  using Num = typename E::Num;
  using Description = DescriptionIn<typename E::Place>;
  using Layout = LayoutIn<typename E::Place>;
  using Examples = ExamplesIn<typename E::Place>;
  using Data = fastmeta::Data<S, typename E::Place>;

  E& e;
  const Description& network;
  const Layout& layout;
  const Data& data;
  const int slot;     // of this task among those together
  const bool loaded;  // whether an earlier task left the parameters here
  const int depth = int(network.layers.size());
  View support_x = {}, query_x = {};  // where the inputs lie
  Chunked<Layout, E::takes_graphs> at_hand = {};

  // use(layout) of each part of the chunks, or of the one where there are none
  template <class Use>
  FASTMETA_DEVICE void each_part(Use use) const {
    if (at_hand.parts == nullptr) return use(layout);
    for (int part = 0; part < network.parts; ++part) use(at_hand.parts[part]);
  }
  // What a block holds of the layers after the body.
  FASTMETA_DEVICE View head(int64_t block) const {
    const int size = int(layout.block - layout.body);
    return {block + layout.body, 1, size, size, 1};
  }
  FASTMETA_DEVICE void clear(View v) {
    e.map([](Num& out) { out = Num{}; }, v);
  }
  FASTMETA_DEVICE DenseLayer<E> layer(int l) { return {e, network.layers[l], layout.layers[l]}; }
  FASTMETA_DEVICE DualProduct<E> dual() { return {e, network, layout.dual, slot}; }
  FASTMETA_DEVICE bool is_dual(int l, int tensor) const {
    return network.dual && l == 0 && tensor == kWeight;
  }
  FASTMETA_DEVICE bool is_query(const Examples& set) const { return &set == &layout.query; }
  FASTMETA_DEVICE int count(const Examples& set) const {
    return is_query(set) ? network.query : network.support;
  }
  FASTMETA_DEVICE const Loss& loss(const Examples& set) const {
    return is_query(set) ? network.query_loss : network.loss;
  }

  FASTMETA_DEVICE bool in_chunks() const { return E::takes_graphs && network.chunk > 0; }
  // Whether steps move the weights where the gradient's product is made.
  FASTMETA_DEVICE bool steps_plainly() const { return is_plain(network.rule) && !in_chunks(); }

  // The block of theta_k. Those of all steps share one, where they are not kept.
  FASTMETA_DEVICE int64_t theta(int k) const {
    const int slot = keeps_weights(network) || k == 0 ? k : 1;
    return layout.theta + slot * (layout.block - layout.body);
  }
  // The block of the vector that H_k is multiplied by: that of theta_{k+1} where each has one, and is
  // needed no more.
  FASTMETA_DEVICE int64_t vector(int k) const {
    return keeps_weights(network) && !network.open ? theta(k + 1) : layout.vector;
  }
  // The blocks of g_k, and of the j-th state of an update rule after k > 0 steps.
  FASTMETA_DEVICE int64_t gradient(int k) const {
    return layout.gradient + (keeps_gradients(network) ? k : 0) * (layout.block - layout.body);
  }
  FASTMETA_DEVICE int64_t state(int j, int k) const {
    return layout.states[j] + (keeps_states(network) ? k - 1 : 0) * (layout.block - layout.body);
  }
  // What clipping scales g_k by [1, 1].
  FASTMETA_DEVICE View clip(int k) const {
    return part(layout.clips, 1, keeps_gradients(network) ? k : 0);
  }
  // The blocks where theta_k is found: what does not adapt stays in theta_0.
  FASTMETA_DEVICE Blocks blocks(int l, int k) const {
    Blocks at;
    for (int i = 0; i < kTensors; ++i) at.of[i] = theta(network.layers[l].adapts[i] ? k : 0);
    return at;
  }

  FASTMETA_DEVICE const Trace* traces(const Examples& set, int k) const {
    const bool kept = &set == &layout.support && layout.traces_kept > 1;
    return &set.traces[kept ? (k * at_hand.chunks(network) + at_hand.chunk) * depth : 0];
  }
  FASTMETA_DEVICE View output(const Examples& set, const Trace* trace, int l) const {
    return l >= 0 ? trace[l].value : is_query(set) ? query_x : support_x;
  }
  FASTMETA_DEVICE View input(const Examples& set, const Trace* trace, int l) const {
    return output(set, trace, network.layers[l].from);
  }
  // Where the steps sum the derivative by the body's output [N, H]: its last layer's delta.
  FASTMETA_DEVICE View body_cotangent(const Examples& set) const {
    return set.traces[network.body - 1].delta;
  }

  // Where the derivative by a set's inputs is asked for; of the support set by that of step k.
  FASTMETA_DEVICE Global<S> of_inputs(const Examples& set, int k) const {
    if (is_query(set)) return data.of_query;
    const int64_t size = int64_t(network.support) * network.layers[0].in;
    return data.of_support.at(network.per_step_support ? k * size : 0);
  }

  // use(layer, tensor) of what adapts in primal form
  template <class Use>
  FASTMETA_DEVICE void adapting(Use use) const {
    for (int l = network.body; l < depth; ++l) {
      for (int i = 0; i < kTensors; ++i) {
        if (network.layers[l].adapts[i] && !is_dual(l, i)) use(l, i);
      }
    }
  }
  // use(parameter of a block, its place among all P parameters), from that layer on
  template <class Use>
  FASTMETA_DEVICE void parameters(int from, int64_t block, Use use) {
    int64_t place = 0;
    for (int l = 0; l < depth; ++l) {
      for (int i = 0; i < kTensors; ++i) {
        if (!network.layers[l].has[i]) continue;
        const View p = layer(l).tensor(i, block);
        if (l >= from && !is_dual(l, i)) use(p, place);
        place += int64_t(p.rows) * p.cols;
      }
    }
  }
  FASTMETA_DEVICE S rate(int k, int l, int tensor) const {
    return data.rates[(k * depth + l) * kTensors + tensor];
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
