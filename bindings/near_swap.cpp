#include "freemerge/near_swap.h"

#include "buffers.h"

void bind_near_swap(py::module_& m) {
  using namespace freemerge;
  m.def("near_swap", [](const py::array& base, const py::array& expert, float t, py::array out) {
    const auto start = source_of(base), end = source_of(expert);
    const auto target = target_of(out);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(near_swap)(start, end, n, t, target);
  });
}
