// Other looks at a matrix that lies somewhere.
#pragma once

#include "network.h"

namespace fastmeta::FASTMETA_NAMESPACE {

inline FASTMETA_DEVICE View transposed(View v) {
  return {v.offset, v.cols, v.rows, v.col_stride, v.row_stride};
}

// A row [1, C] as a matrix of `rows` such.
inline FASTMETA_DEVICE View repeated(View row, int rows) {
  return {row.offset, rows, row.cols, 0, row.col_stride};
}

inline FASTMETA_DEVICE View rows_from(View all, int first, int rows) {
  return {all.offset + int64_t(first) * all.row_stride, rows, all.cols, all.row_stride,
          all.col_stride};
}
// The rows of one of several matrices that lie below each other.
inline FASTMETA_DEVICE View part(View all, int rows, int slot) {
  return rows_from(all, slot * rows, rows);
}

// A column [N, 1] beside a matrix [N, C].
inline FASTMETA_DEVICE View beside(View column, View matrix) {
  return {column.offset, matrix.rows, matrix.cols, column.row_stride, 0};
}

// A number [1, 1] beside a matrix.
inline FASTMETA_DEVICE View throughout(View number, View matrix) {
  return {number.offset, matrix.rows, matrix.cols, 0, 0};
}

}  // namespace fastmeta::FASTMETA_NAMESPACE
