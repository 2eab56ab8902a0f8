#include "freemerge/drop_mask.h"

#include "masks.h"

// The lines along dimension 1 (or the only one) as [count, width, stride].
static std::array<std::size_t, 3> lines_of(const py::array& array) {
  if (array.ndim() == 0) return {1, 1, 1};
  if (array.ndim() == 1) return {1, static_cast<std::size_t>(array.shape(0)), 1};
  std::size_t stride = 1;
  for (py::ssize_t dimension = 2; dimension < array.ndim(); ++dimension) stride *= static_cast<std::size_t>(array.shape(dimension));
  return {static_cast<std::size_t>(array.shape(0)), static_cast<std::size_t>(array.shape(1)), stride};
}

void bind_drop_mask(py::module_& m) {
  using namespace freemerge;
  m.def("drop_mask", [](const std::optional<py::array>& base, const py::array& expert, double density, double epsilon,
                        const std::array<std::uint32_t, 2>& key, py::array out) {
    const auto start = source_of(base), end = source_of(expert);
    const auto [count, width, stride] = lines_of(expert);
    auto* mask = mask_target_of(out);
    py::gil_scoped_release unlocked;
    if (epsilon == 0) FREEMERGE_BEST(drop_mask)(count * width * stride, density, key.data(), mask);
    else FREEMERGE_BEST(ranked_drop_mask)(start, end, count, width, stride, density, epsilon, key.data(), mask);
  });
}
