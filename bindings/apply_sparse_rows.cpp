#include "freemerge/apply_sparse_rows.h"

#include "sparse.h"

void bind_apply_sparse_rows(py::module_& m) {
  using namespace freemerge;
  m.def("apply_sparse_rows", [](const py::array& array, const Offsets& offsets, const py::array& columns, const Values& values, float scale,
                                const std::optional<py::array>& start, py::array out, std::optional<py::array> kept) {
    const auto source = source_of(array), begin = source_of(start);
    const auto target = target_of(out), keep = kept ? target_of(*kept) : Target{nullptr, source.dtype};
    const auto sparse = sparse_of(array, offsets, columns, values);
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(apply_sparse_rows)(source, sparse, scale, begin, target, keep);
  });
}
