#include "freemerge/all_finite.h"

#include "buffers.h"

void bind_all_finite(py::module_& m) {
  using namespace freemerge;
  m.def("all_finite", [](const py::array& array) {
    const auto source = source_of(array);
    const auto n = static_cast<std::size_t>(array.size());
    py::gil_scoped_release unlocked;
    return FREEMERGE_BEST(all_finite)(source, n);
  });
}
