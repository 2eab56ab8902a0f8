#include "freemerge/mask_statistics.h"

#include "masks.h"

void bind_mask_statistics(py::module_& m) {
  using namespace freemerge;
  m.def("mask_statistics", [](const std::optional<py::array>& base, const py::array& expert, const py::array& mask) {
    const auto start = source_of(base), end = source_of(expert);
    const auto* bits = mask_of(mask);
    const auto n = static_cast<std::size_t>(expert.size());
    double result[4];
    {
      py::gil_scoped_release unlocked;
      FREEMERGE_BEST(mask_statistics)(start, end, bits, n, result);
    }
    return py::make_tuple(result[0], result[1], result[2], result[3]);
  });
}
