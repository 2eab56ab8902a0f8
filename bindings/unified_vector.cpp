#include "freemerge/unified_vector.h"

#include "masks.h"

void bind_unified_vector(py::module_& m) {
  using namespace freemerge;
  m.def("unified_vector", [](const py::array& base, const std::vector<py::array>& experts, std::vector<py::array> masks, py::array out) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    std::vector<std::uint8_t*> bits;
    for (auto& mask : masks) bits.push_back(mask_target_of(mask));
    const auto target = target_of(out);
    const auto n = static_cast<std::size_t>(base.size());
    py::array_t<double> sums({static_cast<py::ssize_t>(sources.size()), py::ssize_t{2}});
    double* found = sums.mutable_data();
    {
      py::gil_scoped_release unlocked;
      FREEMERGE_BEST(unified_vector)(start, sources.data(), static_cast<int>(sources.size()), n, bits.data(), target, found);
    }
    return sums;
  });
}
