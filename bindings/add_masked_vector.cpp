#include "freemerge/add_masked_vector.h"

#include "masks.h"

void bind_add_masked_vector(py::module_& m) {
  using namespace freemerge;
  m.def("add_masked_vector", [](const py::array& array, const py::array& vector, const py::array& mask, float scale, py::array out) {
    const auto start = source_of(array), added = source_of(vector);
    const auto* bits = mask_of(mask);
    const auto target = target_of(out);
    const auto n = static_cast<std::size_t>(array.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_masked_vector)(start, added, bits, scale, n, target);
  });
}
