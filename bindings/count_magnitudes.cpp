#include "freemerge/count_magnitudes.h"

#include "buffers.h"

void bind_count_magnitudes(py::module_& m) {
  using namespace freemerge;
  m.def("count_magnitudes", [](const std::optional<py::array>& base, const py::array& expert, float value) {
    const auto start = source_of(base), end = source_of(expert);
    const auto n = static_cast<std::size_t>(expert.size());
    MagnitudeCounts counts;
    {
      py::gil_scoped_release unlocked;
      counts = FREEMERGE_BEST(count_magnitudes)(start, end, n, value);
    }
    return py::make_tuple(counts.greater, counts.equal);
  });
}
