#include "freemerge/add_elected.h"

#include "buffers.h"

void bind_add_elected(py::module_& m) {
  using namespace freemerge;
  m.def("add_elected", [](const py::array& base, const std::vector<py::array>& task_vectors, const std::vector<float>& weights,
                          float scaling, bool normalize, py::array out) {
    const auto sources = sources_of(task_vectors);
    const auto target = target_of(out);
    const auto start = source_of(base);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_elected)(start, sources.data(), weights.data(), static_cast<int>(sources.size()), n, scaling, normalize, target);
  });
}
