// Sparse rows of NumPy arrays to what an op takes; the arrays have to outlive it.
#pragma once
#include "buffers.h"
#include "freemerge/apply_sparse_rows.h"

namespace freemerge {

using Offsets = py::array_t<std::int64_t, py::array::c_style>;
using Values = py::array_t<float, py::array::c_style>;

// `array` is one of the shape that the sparse rows belong to.
inline SparseSource sparse_of(const py::array& array, const Offsets& offsets, const py::array& columns, const Values& values) {
  const auto [rows, width] = rows_of(array);
  require_contiguous(columns);
  return {offsets.data(), columns.data(), columns.itemsize() == 4, values.data(), rows, width};
}

}  // namespace freemerge
