// Products of float matrices that are read and written four floats, 16 bytes, at a time.
//
// A thread makes tiles of 4 x 4 sums. A side that is contiguous along the depth is `deep`: its four rows
// lie as far apart as there are tiles, and a thread reads four of the depth. For any other, each
// thread's four results are contiguous.
#pragma once

#include "../network.h"
#include "../views.h"
#include "machine.h"

namespace fastmeta::FASTMETA_NAMESPACE {

using cuda::Float4;
using cuda::float4_at;

// Two matrices of which a product is, or a part of it.
struct Factors {
  View left, right;
};

// Whether each row can be read four floats at a time, its padding included.
inline FASTMETA_DEVICE bool is_float4(View v) {
  return v.col_stride == 1 && int(v.offset) % 4 == 0 && (v.row_stride % 4 == 0 || v.rows == 1);
}

// The tiles of a result. Of four lanes, two beside each other share a tile's rows and two that are two
// apart its columns, as far as there are pairs: that halves what a warp's reads of 16 bytes take.
struct Tiles {
  int down, across;

  FASTMETA_DEVICE void find(int number, int& row, int& col) const {
    const int strip = number / (2 * across), place = number - strip * 2 * across;
    row = 2 * strip, col = place;
    if (row + 1 == down) return;
    const bool paired = place / 4 < across / 2;
    row += paired ? place / 2 % 2 : place % 2;
    col = paired ? place / 4 * 2 + place % 2 : across - 1;
  }
};

// What a tile takes of one side [rows of the result, depth]; the right one is transposed.
template <bool deep, class Storage>
class Side {
 public:
  FASTMETA_DEVICE Side(Storage storage, View v, int tile, int tiles)
      : storage_(storage), apart_(v.col_stride) {
#pragma unroll
    for (int n = 0; n < (deep ? 4 : 1); ++n) {
      const int row = deep ? tile + n * tiles : 4 * tile;
      // Past the last row, that one again.
      at_[n] = int(v.offset) + (row < v.rows ? row : v.rows - 1) * v.row_stride;
    }
  }

  // Those at k.
  FASTMETA_DEVICE void read(int k, float (&x)[4]) const {
    if constexpr (deep) {
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = storage_[at_[n] + k];
    } else {
      const Float4 four = read_float4(k, 0);
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = four.of[n];
    }
  }
  // The n-th four of those from k to k + 3: those of a row, or if not deep of a depth.
  FASTMETA_DEVICE Float4 read_float4(int k, int n) const {
    return float4_at(storage_, deep ? at_[n] + k : at_[0] + (k + n) * apart_);
  }

 private:
  Storage storage_;
  const int apart_;
  int at_[deep ? 4 : 1];
};

// One lane's part of the depth, of `parts`.
template <bool left_deep, bool right_deep, class Storage>
FASTMETA_DEVICE void add_part(const Side<left_deep, Storage>& left,
                              const Side<right_deep, Storage>& right, int depth, int part,
                              int parts, float (&sums)[4][4]) {
  constexpr bool any_deep = left_deep || right_deep;
  const int whole = any_deep ? depth / 4 * 4 : 0;
#pragma unroll 1
  for (int k = 4 * part; k < whole; k += 4 * parts) {
    Float4 x[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n] = left.read_float4(k, n);
    // A float4 of the right side at a time, for want of registers.
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Float4 y = right.read_float4(k, n);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int at = right_deep ? m : n;  // of the depth
          sums[r][right_deep ? n : m] += (left_deep ? x[r].of[at] : x[at].of[r]) * y.of[m];
        }
      }
    }
  }
#pragma unroll(any_deep ? 1 : 2)
  for (int k = whole + part; k < depth; k += parts) {
    float x[4], y[4];
    left.read(k, x);
    right.read(k, y);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[r][c] += x[r] * y[c];
    }
  }
}

// Adds the sums of two lanes. The one keeps the first `kept` rows, the one across the next as many.
template <int kept>
FASTMETA_DEVICE void share_sums(float (&sums)[4][4], int bit) {
  const bool upper = (cuda::thread() & bit) != 0;
#pragma unroll
  for (int r = 0; r < kept; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float given = upper ? sums[r][c] : sums[r + kept][c];
      const float own = upper ? sums[r + kept][c] : sums[r][c];
      sums[r][c] = own + cuda::from_lane_across(given, bit);
    }
  }
}

// `one(sum, i, j)` gets every element of the sum of all products, or `four(sums, i, j)` four of a row,
// where the right side is not deep. 1, 2 or 4 lanes, `parts`, divide the depth of a tile.
template <bool left_deep, bool right_deep, class Storage, int count, class One, class Quad>
FASTMETA_DEVICE void for_float4(Storage storage, int rows, int cols,
                               const Factors (&factors)[count], int parts, One one, Quad four) {
  const Tiles all{(rows + 3) / 4, (cols + 3) / 4};
  const int tiles = all.down * all.across, together = 32 / parts;  // together: those of a warp
  const int lane = cuda::thread() % 32, part = lane / together;
  for (int first = cuda::thread() / 32 * together; first < tiles;
       first += cuda::threads() / 32 * together) {
    const int number = first + lane % together;
    int row, col;
    all.find(number < tiles ? number : tiles - 1, row, col);
    float sums[4][4] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const View left = factors[i].left, right = transposed(factors[i].right);
      add_part(Side<left_deep, Storage>(storage, left, row, all.down),
               Side<right_deep, Storage>(storage, right, col, all.across), left.cols, part, parts,
               sums);
    }
    if (parts > 1) share_sums<2>(sums, 16);
    if (parts > 2) share_sums<1>(sums, 8);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int r = part * 4 / parts + n;
      const int i = left_deep ? row + r * all.down : 4 * row + r;
      if (number >= tiles || n * parts >= 4 || i >= rows) continue;
      if constexpr (right_deep) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int j = col + c * all.across;
          if (j < cols) one(sums[n][c], i, j);
        }
      } else {
        four(Float4{{sums[n][0], sums[n][1], sums[n][2], sums[n][3]}}, i, 4 * col);
      }
    }
  }
}

// Makes the product that way, where both sides of all factors can be read so.
template <class Storage, int count, class One, class Quad>
FASTMETA_DEVICE bool multiply_by_float4(Storage storage, int rows, int cols,
                                       const Factors (&factors)[count], One one, Quad four) {
  bool deep_left = true, deep_right = true, wide_left = true, wide_right = true;
  int depth = factors[0].left.cols;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const View left = factors[i].left, right = factors[i].right;
    deep_left = deep_left && is_float4(left);
    wide_left = wide_left && is_float4(transposed(left));
    deep_right = deep_right && is_float4(transposed(right));
    wide_right = wide_right && is_float4(right);
    depth = left.cols < depth ? left.cols : depth;
  }
  const int tiles = ((rows + 3) / 4) * ((cols + 3) / 4);
  int parts = 1;
  while (parts < 4 && 2 * parts * tiles <= cuda::threads() && depth >= 8 * parts) parts *= 2;
  if (wide_left && wide_right) {
    for_float4<false, false>(storage, rows, cols, factors, parts, one, four);
  } else if (depth >= 4 && deep_left && deep_right) {
    for_float4<true, true>(storage, rows, cols, factors, parts, one, four);
  } else if (depth >= 4 && deep_left && wide_right) {
    for_float4<true, false>(storage, rows, cols, factors, parts, one, four);
  } else {
    return false;
  }
  return true;
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
