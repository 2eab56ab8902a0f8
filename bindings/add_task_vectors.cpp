#include "freemerge/add_task_vectors.h"

#include "buffers.h"

void bind_add_task_vectors(py::module_& m) {
  using namespace freemerge;
  m.def("add_task_vectors", [](const py::array& base, const std::vector<py::array>& experts, const std::vector<float>& weights,
                               py::array out) {
    const auto sources = sources_of(experts);
    const auto target = target_of(out);
    const auto start = source_of(base);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_task_vectors)(start, sources.data(), weights.data(), static_cast<int>(sources.size()), n, target);
  });
}
