#include "freemerge/add_scaled_rows.h"

#include "lines.h"

void bind_add_scaled_rows(py::module_& m) {
  using namespace freemerge;
  using Weights = py::array_t<float, py::array::c_style | py::array::forcecast>;
  m.def("add_scaled_rows", [](const std::optional<py::array>& base, const std::vector<py::array>& arrays, const Weights& weights,
                              const std::string& lines, py::array out) {
    const auto start = source_of(base);
    const auto sources = sources_of(arrays);
    const LineMatrix matrix = lines_of(out, lines);
    const auto target = target_of(out);
    const float* numbers = weights.data();
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_scaled_rows)(start, sources.data(), numbers, static_cast<int>(sources.size()), matrix.rows, matrix.width,
                                    matrix.by_column, target);
  });
}
