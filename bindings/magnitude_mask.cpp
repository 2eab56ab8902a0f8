#include "freemerge/magnitude_mask.h"

#include <limits>

#include "masks.h"

using namespace freemerge;

using Values = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ties = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

void bind_magnitude_mask(py::module_& m) {
  m.def("magnitude_mask", [](const std::optional<py::array>& base, const py::array& expert, const std::pair<Values, Ties>& lower,
                             const std::optional<std::pair<Values, Ties>>& upper, py::array out) {
    const auto start = source_of(base), end = source_of(expert);
    const auto [rows, width] = rows_of(expert);
    const auto count = static_cast<std::size_t>(lower.first.size());
    const Cuts low{lower.first.data(), lower.second.data()};
    std::vector<float> never(count, std::numeric_limits<float>::infinity());
    std::vector<std::int64_t> no_ties(count);
    const Cuts high = upper ? Cuts{upper->first.data(), upper->second.data()} : Cuts{never.data(), no_ties.data()};
    auto* mask = mask_target_of(out);
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(magnitude_mask)(start, end, rows, width, low, high, count != 1, mask);
  });
}
