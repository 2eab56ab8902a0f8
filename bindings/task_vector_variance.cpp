#include "freemerge/task_vector_variance.h"

#include "buffers.h"

void bind_task_vector_variance(py::module_& m) {
  using namespace freemerge;
  m.def("task_vector_variance", [](const py::array& base, const std::vector<py::array>& experts, py::array_t<float> out) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    require_contiguous(out);
    float* target = out.mutable_data();
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(task_vector_variance)(start, sources.data(), static_cast<int>(sources.size()), n, target);
  });
}
