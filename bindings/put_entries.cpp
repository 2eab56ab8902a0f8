#include "freemerge/put_entries.h"

#include "sparse.h"

void bind_put_entries(py::module_& m) {
  using namespace freemerge;
  m.def("put_entries", [](py::array array, const Offsets& offsets, const py::array& columns, const py::array& entries) {
    const auto target = target_of(array);
    const auto source = source_of(entries);
    const auto [rows, width] = rows_of(array);
    require_contiguous(columns);
    const SparseSource sparse{offsets.data(), columns.data(), columns.itemsize() == 4, nullptr, rows, width};
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(put_entries)(sparse, source.data, target);
  });
}
