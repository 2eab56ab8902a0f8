#include "freemerge/add_expert_products.h"

#include "sparse.h"

void bind_add_expert_products(py::module_& m) {
  using namespace freemerge;
  m.def("add_expert_products", [](const py::array& x, const std::vector<Offsets>& offsets, const std::vector<py::array>& columns,
                                  const std::vector<Values>& values, const std::vector<float>& scales, const Values& weights, py::array out) {
    const auto source = source_of(x);
    const auto target = target_of(out);
    const auto [n, width] = rows_of(x);
    const auto rows = rows_of(out).second;
    std::vector<SparseSource> experts;
    for (std::size_t e = 0; e < offsets.size(); ++e) {
      require_contiguous(columns[e]);
      experts.push_back({offsets[e].data(), columns[e].data(), columns[e].itemsize() == 4, values[e].data(), rows, width});
    }
    const auto groups = static_cast<std::size_t>(weights.shape(0));
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_expert_products)(source, experts.data(), scales.data(), weights.data(), n, experts.size(), groups, target);
  });
}
