// NumPy arrays to the pointers an op takes. Everything is checked here, with the interpreter lock held, before an op runs without it.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "freemerge/dtype.h"

namespace py = pybind11;

namespace freemerge {

// float8 and bfloat16 are NumPy extension types (ml_dtypes) without a type code of their own: the name decides.
inline DType dtype_named(const std::string& name) {
  if (name == "bfloat16") return DType::bf16;
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "float64") return DType::f64;
  if (name == "float8_e4m3fn") return DType::f8_e4m3fn;
  if (name == "float8_e5m2") return DType::f8_e5m2;
  throw py::type_error("freemerge.kernels._cpu: no kernel for dtype " + name);
}

// NumPy composes the name anew each time; the type's number, given out once a process, finds the answer of the first time.
inline DType dtype_of(const py::array& array) {
  static std::unordered_map<int, DType> known;  // the interpreter lock is held
  const int number = array.dtype().num();
  const auto found = known.find(number);
  if (found != known.end()) return found->second;
  return known[number] = dtype_named(py::cast<std::string>(array.dtype().attr("name")));
}

inline void require_contiguous(const py::array& array) {
  if (!(array.flags() & py::array::c_style)) throw py::value_error("freemerge.kernels._cpu: arrays must be C-contiguous");
}

inline Source source_of(const py::array& array) {
  require_contiguous(array);
  return {array.data(), dtype_of(array)};
}

inline Source source_of(const std::optional<py::array>& array) {
  return array ? source_of(*array) : Source{nullptr, DType::f32};
}

// Rows are slices along the last dimension; a 0-d array is 1 x 1.
inline std::pair<std::size_t, std::size_t> rows_of(const py::array& array) {
  std::size_t rows = 1;
  for (py::ssize_t dimension = 0; dimension + 1 < array.ndim(); ++dimension) rows *= static_cast<std::size_t>(array.shape(dimension));
  return {rows, array.ndim() == 0 ? 1 : static_cast<std::size_t>(array.shape(array.ndim() - 1))};
}

inline std::vector<Source> sources_of(const std::vector<py::array>& arrays) {
  std::vector<Source> sources;
  for (const auto& array : arrays) sources.push_back(source_of(array));
  return sources;
}

inline Target target_of(py::array& array) {
  require_contiguous(array);
  return {array.mutable_data(), dtype_of(array)};  // mutable_data throws where the array is read-only
}

}  // namespace freemerge
