#include "freemerge/apply_sparse_rows.h"

#include "buffers.h"

void bind_apply_sparse_rows(py::module_& m) {
  using namespace freemerge;
  m.def("apply_sparse_rows", [](const py::array& array, const py::array_t<std::int64_t, py::array::c_style>& offsets,
                                const py::array& columns, const py::array_t<float, py::array::c_style>& values, float scale,
                                const std::optional<py::array>& start, py::array out) {
    const auto source = source_of(array), begin = source_of(start);
    const auto target = target_of(out);
    const auto [rows, width] = rows_of(array);
    require_contiguous(columns);
    const SparseSource sparse{offsets.data(), columns.data(), columns.itemsize() == 4, values.data(), rows, width};
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(apply_sparse_rows)(source, sparse, scale, begin, target);
  });
}
