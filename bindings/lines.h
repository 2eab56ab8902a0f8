// The lines of an array that get numbers of their own: all entries, slices along the last dimension, or along the first.
#pragma once
#include "buffers.h"

namespace freemerge {

struct LineMatrix {
  std::size_t rows, width;
  bool by_column;

  std::size_t count() const { return by_column ? width : rows; }
};

inline LineMatrix lines_of(const py::array& array, const std::string& lines) {
  const auto size = static_cast<std::size_t>(array.size());
  if (lines == "column") {
    if (array.ndim() < 2) return {size, 1, true};
    std::size_t width = 1;
    for (py::ssize_t dimension = 1; dimension < array.ndim(); ++dimension) width *= static_cast<std::size_t>(array.shape(dimension));
    return {static_cast<std::size_t>(array.shape(0)), width, true};
  }
  if (lines == "tensor" || array.ndim() < 2) return {1, size, false};
  const auto [rows, width] = rows_of(array);
  return {rows, width, false};
}

}  // namespace freemerge
