#include "freemerge/fusion_importance.h"

#include "buffers.h"

void bind_fusion_importance(py::module_& m) {
  using namespace freemerge;
  m.def("fusion_importance", [](const py::array& base, const py::array& expert, py::array_t<float> out) {
    const auto start = source_of(base), end = source_of(expert);
    const auto [rows, width] = rows_of(base);
    require_contiguous(out);
    float* target = out.mutable_data();
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(fusion_importance)(start, end, rows, width, target);
  });
}
