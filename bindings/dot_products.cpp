#include "freemerge/dot_products.h"

#include "lines.h"

void bind_dot_products(py::module_& m) {
  using namespace freemerge;
  m.def("dot_products", [](const std::optional<py::array>& base, const std::vector<py::array>& arrays, const std::string& lines) {
    const auto start = source_of(base);
    const auto sources = sources_of(arrays);
    const LineMatrix matrix = lines_of(arrays.at(0), lines);
    const auto T = sources.size();
    py::array_t<double> result({matrix.count(), T, T});
    double* products = result.mutable_data();
    {
      py::gil_scoped_release unlocked;
      FREEMERGE_BEST(dot_products)(start, sources.data(), static_cast<int>(T), matrix.rows, matrix.width, matrix.by_column, products);
    }
    return result;
  });
}
