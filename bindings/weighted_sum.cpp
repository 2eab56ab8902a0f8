#include "freemerge/weighted_sum.h"

#include "buffers.h"

void bind_weighted_sum(py::module_& m) {
  using namespace freemerge;
  m.def("weighted_sum", [](const std::vector<py::array>& arrays, const std::vector<float>& weights, py::array out) {
    const auto sources = sources_of(arrays);
    const auto target = target_of(out);
    const auto n = static_cast<std::size_t>(out.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(weighted_sum)(sources.data(), weights.data(), static_cast<int>(sources.size()), n, target);
  });
}
