#include "freemerge/add_balanced.h"

#include "buffers.h"

void bind_add_balanced(py::module_& m) {
  using namespace freemerge;
  using Numbers = std::vector<float>;
  m.def("balance_scores", [](const py::array& base, const std::vector<py::array>& experts, const Numbers& lows, const Numbers& highs,
                             bool normalized, py::array_t<float> out) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    require_contiguous(out);
    float* target = out.mutable_data();
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(balance_scores)(start, sources.data(), lows.data(), highs.data(), static_cast<int>(sources.size()), n, normalized,
                                   target);
  });
  m.def("add_balanced", [](const py::array& base, const std::vector<py::array>& experts, const Numbers& lows, const Numbers& highs,
                           const Numbers& floors, const Numbers& tops, const Numbers& weights, bool normalized, py::array out) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    const auto target = target_of(out);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_balanced)(start, sources.data(), lows.data(), highs.data(), floors.data(), tops.data(), weights.data(),
                                 static_cast<int>(sources.size()), n, normalized, 1e-12f, target);
  });
}
