#include "freemerge/magnitude_threshold.h"

#include "buffers.h"

using namespace freemerge;

static py::tuple over_all(const std::vector<std::optional<py::array>>& bases, const std::vector<py::array>& experts, std::size_t rank) {
  std::vector<Pair> tensors;
  for (std::size_t i = 0; i < experts.size(); ++i)
    tensors.push_back({source_of(bases[i]), source_of(experts[i]), static_cast<std::size_t>(experts[i].size())});
  Cut cut;
  {
    py::gil_scoped_release unlocked;
    cut = FREEMERGE_BEST(magnitude_threshold)(tensors, rank);
  }
  py::array_t<float> values(1);
  py::array_t<std::int64_t> ties(1);
  *values.mutable_data() = cut.value;
  *ties.mutable_data() = static_cast<std::int64_t>(cut.ties);
  return py::make_tuple(values, ties);
}

static py::tuple of_each_row(const std::optional<py::array>& base, const py::array& expert, std::size_t rank) {
  const auto start = source_of(base), end = source_of(expert);
  const auto [rows, width] = rows_of(expert);
  py::array_t<float> values(rows);
  py::array_t<std::int64_t> ties(rows);
  float* value = values.mutable_data();
  std::int64_t* tie = ties.mutable_data();
  {
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(row_thresholds)(start, end, rows, width, rank, value, tie);
  }
  return py::make_tuple(values, ties);
}

void bind_magnitude_threshold(py::module_& m) {
  m.def("magnitude_threshold", [](const std::vector<std::optional<py::array>>& bases, const std::vector<py::array>& experts,
                                  std::size_t rank, const std::string& scope) {
    return scope == "row" ? of_each_row(bases.at(0), experts.at(0), rank) : over_all(bases, experts, rank);
  });
}
