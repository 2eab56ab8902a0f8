#include "freemerge/sparse_rows.h"

#include "buffers.h"

using namespace freemerge;

namespace {

// The arrays of the result, made when the op knows how many entries there are.
struct Result {
  std::size_t rows, width;
  py::array offsets, columns, values;

  SparseTarget allocate(std::size_t count) {
    py::gil_scoped_acquire locked;
    offsets = py::array_t<std::int64_t>(rows + 1);
    values = py::array_t<float>(count);
    if (width <= 65536) columns = py::array_t<std::uint16_t>(count);
    else columns = py::array_t<std::uint32_t>(count);
    return {static_cast<std::int64_t*>(offsets.mutable_data()), columns.mutable_data(), static_cast<float*>(values.mutable_data())};
  }
};

Cut cut_of(const py::object& selection, const char* value, const char* ties) {
  return {py::cast<float>(selection.attr(value)), py::cast<std::size_t>(selection.attr(ties))};
}

}  // namespace

void bind_sparse_rows(py::module_& m) {
  m.def("sparse_rows", [](const std::optional<py::array>& base, const py::array& expert, std::size_t first,
                          std::optional<std::size_t> last, const std::string& scope, const py::object& within) {
    const auto start = source_of(base), end = source_of(expert);
    const auto [rows, width] = rows_of(expert);
    Result result{rows, width, {}, {}, {}};
    const AllocateSparse allocate = [&result](std::size_t count) { return result.allocate(count); };
    if (within.is_none()) {
      py::gil_scoped_release unlocked;
      if (scope == "row") FREEMERGE_BEST(sparse_rows_each)(start, end, rows, width, first, last.value(), allocate);
      else FREEMERGE_BEST(sparse_rows)(start, end, rows, width, first, last.value(), allocate);
    } else {
      const Cut upper = cut_of(within, "upper", "upper_ties"), lower = cut_of(within, "lower", "lower_ties");
      py::gil_scoped_release unlocked;
      FREEMERGE_BEST(sparse_rows_between)(start, end, rows, width, upper, lower, allocate);
    }
    return py::make_tuple(result.offsets, result.columns, result.values);
  });
}
