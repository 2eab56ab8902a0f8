#include <pybind11/pybind11.h>

#include "freemerge/isa.h"
#include "freemerge/threads.h"

namespace py = pybind11;

void bind_add_balanced(py::module_&);
void bind_add_elected(py::module_&);
void bind_add_expert_products(py::module_&);
void bind_add_masked(py::module_&);
void bind_add_masked_vector(py::module_&);
void bind_add_scaled_rows(py::module_&);
void bind_add_task_vectors(py::module_&);
void bind_add_trimmed(py::module_&);
void bind_all_finite(py::module_&);
void bind_apply_sparse_rows(py::module_&);
void bind_count_magnitudes(py::module_&);
void bind_count_range(py::module_&);
void bind_dot_products(py::module_&);
void bind_drop_mask(py::module_&);
void bind_fusion_importance(py::module_&);
void bind_high_pass(py::module_&);
void bind_magnitude_mask(py::module_&);
void bind_magnitude_threshold(py::module_&);
void bind_mask_statistics(py::module_&);
void bind_near_swap(py::module_&);
void bind_put_entries(py::module_&);
void bind_sparse_rows(py::module_&);
void bind_task_vector_statistics(py::module_&);
void bind_task_vector_variance(py::module_&);
void bind_unified_vector(py::module_&);
void bind_weighted_sum(py::module_&);

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The C++ versions of the ops of freemerge.kernels, under the names of the ops.";
  m.def("isa", [] { return freemerge::isa_name(); });
  m.def("threads", &freemerge::threads);
  m.def("set_threads", &freemerge::set_threads);
  bind_add_balanced(m);
  bind_add_elected(m);
  bind_add_expert_products(m);
  bind_add_masked(m);
  bind_add_masked_vector(m);
  bind_add_scaled_rows(m);
  bind_add_task_vectors(m);
  bind_add_trimmed(m);
  bind_all_finite(m);
  bind_apply_sparse_rows(m);
  bind_count_magnitudes(m);
  bind_count_range(m);
  bind_dot_products(m);
  bind_drop_mask(m);
  bind_fusion_importance(m);
  bind_high_pass(m);
  bind_magnitude_mask(m);
  bind_magnitude_threshold(m);
  bind_mask_statistics(m);
  bind_near_swap(m);
  bind_put_entries(m);
  bind_sparse_rows(m);
  bind_task_vector_statistics(m);
  bind_task_vector_variance(m);
  bind_unified_vector(m);
  bind_weighted_sum(m);
}
