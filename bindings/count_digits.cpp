#include "freemerge/count_digits.h"

#include "buffers.h"

void bind_count_digits(py::module_& m) {
  using namespace freemerge;
  m.def("count_digits", [](const std::optional<py::array>& base, const py::array& expert, std::uint32_t found, int below, int width,
                           bool magnitudes) {
    const auto start = source_of(base), end = source_of(expert);
    const auto n = static_cast<std::size_t>(expert.size());
    py::array_t<std::int64_t> counts(py::ssize_t{1} << width);
    std::int64_t* target = counts.mutable_data();
    {
      py::gil_scoped_release unlocked;
      FREEMERGE_BEST(count_digits)(start, end, n, found, below, width, magnitudes, target);
    }
    return counts;
  });
}
