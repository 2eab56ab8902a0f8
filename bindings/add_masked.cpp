#include "freemerge/add_masked.h"

#include "buffers.h"
#include "masks.h"

void bind_add_masked(py::module_& m) {
  using namespace freemerge;
  using Numbers = std::optional<std::vector<float>>;
  m.def("add_masked", [](const py::array& base, const std::vector<py::array>& experts, const std::vector<std::optional<py::array>>& masks,
                         const std::vector<float>& weights, const Numbers& votes, const Numbers& shares, float least, float scaling,
                         py::array out) {
    const auto start = source_of(base);
    const auto sources = sources_of(experts);
    std::vector<const std::uint8_t*> bits;
    for (const auto& mask : masks) bits.push_back(mask_of(mask));
    const auto target = target_of(out);
    const auto n = static_cast<std::size_t>(base.size());
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(add_masked)(start, sources.data(), bits.data(), weights.data(), votes ? votes->data() : nullptr,
                               shares ? shares->data() : nullptr, static_cast<int>(sources.size()), n, least, scaling, target);
  });
}
