// What becomes of the sums of a product. Few types, because engines compile their products anew for
// each of them.
#pragma once

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

struct Keep {
  template <class Num>
  FASTMETA_DEVICE void operator()(Num sum, Num& out) const { out = sum; }
};

template <class S>
struct Add {
  S factor;
  template <class Num>
  FASTMETA_DEVICE void operator()(Num sum, Num& out) const { out = out + factor * sum; }
};

template <class S>
struct AddTo {
  S factor;
  template <class Num>
  FASTMETA_DEVICE void operator()(Num sum, Num& out, Num start) const { out = start + factor * sum; }
};

// Of a gradient: from p, along it and the proximal term's; `share` is 1, or 0 for that alone.
template <class S>
struct Move {
  S share, factor, prox;
  template <class Num>
  FASTMETA_DEVICE void operator()(Num gradient, Num& out, Num p, Num anchor) const {
    out = share * p + factor * (gradient + prox * (p - anchor));
  }
};

}  // namespace fastmeta::FASTMETA_NAMESPACE
