#include "freemerge/task_vector_statistics.h"

#include "buffers.h"

void bind_task_vector_statistics(py::module_& m) {
  using namespace freemerge;
  m.def("task_vector_statistics", [](const std::optional<py::array>& base, const std::vector<py::array>& experts) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    std::vector<std::size_t> sizes;
    for (const auto& expert : experts) sizes.push_back(static_cast<std::size_t>(expert.size()));
    py::array_t<double> result({sources.size(), std::size_t{4}});
    double* row = result.mutable_data();
    {
      py::gil_scoped_release unlocked;
      for (std::size_t t = 0; t < sources.size(); ++t)
        FREEMERGE_BEST(task_vector_statistics)(start, sources[t], sizes[t], row + 4 * t);
    }
    return result;
  });
}
