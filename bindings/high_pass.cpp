#include "freemerge/high_pass.h"

#include <optional>

#include "buffers.h"
#include "freemerge/scratch.h"

namespace {

using namespace freemerge;
using Bounds = py::array_t<std::int32_t, py::array::c_style>;   // [3, length]: inner, below, outer
using Workspace = std::optional<py::array_t<std::uint8_t>>;

HighPass plan_of(const py::array& matrix, const std::string& form, int axis, bool stored, const Bounds& bounds) {
  if (matrix.ndim() != 2) throw py::value_error("freemerge.kernels._cpu: high_pass takes matrices");
  HighPass plan{static_cast<std::size_t>(matrix.shape(0)), static_cast<std::size_t>(matrix.shape(1)), axis, form != "sweeps", stored,
                nullptr, nullptr, nullptr};
  const auto length = static_cast<py::ssize_t>(plan.length());
  if (bounds.ndim() != 2 || bounds.shape(0) != 3 || bounds.shape(1) != length || (plan.complement && axis != 1))
    throw py::value_error("freemerge.kernels._cpu: bounds of another shape or axis");
  plan.inner = bounds.data();
  plan.below = plan.inner + length;
  plan.outer = plan.below + length;
  return plan;
}

// The caller's workspace where it is large enough, else one of our own, which `own` keeps.
float* workspace_for(const HighPass& plan, Workspace& given, std::optional<Scratch>& own) {
  const std::size_t bytes = FREEMERGE_BEST(high_pass_workspace)(plan);
  if (given && static_cast<std::size_t>(given->nbytes()) >= bytes)
    return reinterpret_cast<float*>(given->mutable_data());
  own.emplace(bytes);
  return own->floats();
}

}  // namespace

void bind_high_pass(py::module_& m) {
  m.def("high_pass", [](const std::optional<py::array>& base, const std::vector<py::array>& experts, const std::vector<float>& weights,
                        const std::string& form, int axis, bool stored, const Bounds& bounds, bool add_base, Workspace workspace,
                        py::array out) {
    const auto sources = sources_of(experts);
    const auto target = target_of(out);
    const auto start = base ? source_of(*base) : Source{};
    const HighPass plan = plan_of(out, form, axis, stored, bounds);
    const TaskVectorSum sum{base ? &start : nullptr, sources.data(), weights.data(), static_cast<int>(sources.size())};
    std::optional<Scratch> own;
    float* memory = workspace_for(plan, workspace, own);
    py::gil_scoped_release unlocked;
    FREEMERGE_BEST(high_pass)(plan, sum, add_base, memory, target);
  });
  m.def("high_pass_magnitudes", [](const std::optional<py::array>& base, const std::vector<py::array>& experts, const std::string& form,
                                   int axis, bool stored, const Bounds& bounds, Workspace workspace) {
    const auto sources = sources_of(experts);
    const auto start = base ? source_of(*base) : Source{};
    py::array_t<double> sums(static_cast<py::ssize_t>(experts.size()));
    if (experts.empty()) return sums;
    const HighPass plan = plan_of(experts[0], form, axis, stored, bounds);
    std::optional<Scratch> own;
    float* memory = workspace_for(plan, workspace, own);
    double* result = sums.mutable_data();
    {
      py::gil_scoped_release unlocked;
      const float one = 1.0f;
      for (std::size_t t = 0; t < sources.size(); ++t)
        result[t] = FREEMERGE_BEST(high_pass_magnitude)(plan, {base ? &start : nullptr, &sources[t], &one, 1}, memory);
    }
    return sums;
  });
  m.def("release_scratch", &release_scratch);
}
