#include "freemerge/count_range.h"

#include "buffers.h"

void bind_count_range(py::module_& m) {
  using namespace freemerge;
  m.def("count_range", [](const std::optional<py::array>& base, const py::array& expert, const std::vector<std::uint32_t>& lows,
                          const std::vector<int>& shifts, std::size_t bins, bool magnitudes) {
    const auto start = source_of(base), end = source_of(expert);
    const auto n = static_cast<std::size_t>(expert.size());
    std::vector<KeyRange> ranges;
    for (std::size_t i = 0; i < lows.size(); ++i) ranges.push_back({lows[i], shifts[i]});
    py::array_t<std::int64_t> counts({lows.size(), bins + 2});
    std::int64_t* target = counts.mutable_data();
    {
      py::gil_scoped_release unlocked;
      FREEMERGE_BEST(count_range)(start, end, n, ranges.data(), ranges.size(), bins, magnitudes, target);
    }
    return counts;
  });
}
