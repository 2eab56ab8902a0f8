#include "freemerge/add_trimmed.h"

#include "buffers.h"

static freemerge::Combination combination_named(const std::string& name) {
  if (name == "mean") return freemerge::Combination::mean;
  if (name == "sum") return freemerge::Combination::sum;
  if (name == "max") return freemerge::Combination::max;
  throw py::value_error("freemerge.kernels._cpu: no combination " + name);
}

void bind_add_trimmed(py::module_& m) {
  using namespace freemerge;
  m.def("add_trimmed", [](const py::array& base, const std::vector<py::array>& experts, const std::vector<float>& floors, int zeros,
                          const std::string& combination, float scaling, py::array out) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    const auto target = target_of(out);
    const auto how = combination_named(combination);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_trimmed)(start, sources.data(), floors.data(), static_cast<int>(sources.size()), n, static_cast<float>(zeros), how,
                                scaling, target);
  });
  m.def("sign_majority", [](const py::array& base, const std::vector<py::array>& experts, const std::vector<float>& floors) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    return FREEMERGE_BEST(sign_majority)(start, sources.data(), floors.data(), static_cast<int>(sources.size()), n);
  });
}
