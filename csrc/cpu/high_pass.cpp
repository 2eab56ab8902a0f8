#include "freemerge/high_pass.h"

#include <cmath>

#include "freemerge/high_pass_forms.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

class Writer : public Output {
 public:
  Writer(const Source* base, const Target& out) : base_(base), out_(out) {}

  double take(std::size_t start, std::size_t n, float* values, float scale) const override {
    alignas(64) float base_tile[TILE];
    for (std::size_t i = 0; i < n; ++i) values[i] *= scale;
    if (base_ && base_->dtype == DType::f64) {   // the base keeps its precision, as in add_task_vectors
      alignas(64) double exact[TILE];
      load_tile(base_->at(start), base_->dtype, n, exact);
      for (std::size_t i = 0; i < n; ++i) exact[i] += values[i];
      store_tile(exact, n, out_.dtype, out_.at(start));
      return 0;
    }
    if (base_) {
      load_tile(base_->at(start), base_->dtype, n, base_tile);
      for (std::size_t i = 0; i < n; ++i) values[i] += base_tile[i];
    }
    store_tile(values, n, out_.dtype, out_.at(start));
    return 0;
  }

  void prefetch(std::size_t start, std::size_t n) const override {
    if (base_) prefetch_run<false>(base_->at(start), base_->at(start + n));
    prefetch_run<true>(out_.at(start), out_.at(start + n));
  }

 private:
  const Source* base_;
  const Target& out_;
};

class Magnitude : public Output {
 public:
  double take(std::size_t, std::size_t n, float* values, float scale) const override {
    float sums[LANES] = {};   // short runs: float is enough within one
    std::size_t i = 0;
    for (; i + LANES <= n; i += LANES)
      for (std::size_t k = 0; k < LANES; ++k) sums[k] += std::fabs(values[i + k]);
    for (std::size_t k = 0; i + k < n; ++k) sums[k] += std::fabs(values[i + k]);
    double sum = 0;
    for (const float part : sums) sum += part;
    return sum * scale;
  }

  void prefetch(std::size_t, std::size_t) const override {}
};

static double run(const HighPass& plan, const TaskVectorSum& sum, float* workspace, const Output& output) {
  if (plan.rows == 0 || plan.columns == 0) return 0;
  const Columns columns(plan);
  const Input input(sum);
  return (plan.complement ? filter_by_complement : filter_by_sweeps)(plan, columns, input, output, workspace);
}

std::size_t high_pass_workspace(const HighPass& plan) {
  if (plan.rows == 0 || plan.columns == 0) return 0;
  const Columns columns(plan);
  const std::size_t kept = plan.stored ? columns.kept().size() * groups_of(plan.lines(), GROUP) * POINT : 0;
  return (columns.floats() + kept) * sizeof(float);
}

void high_pass(const HighPass& plan, const TaskVectorSum& sum, bool add_base, float* workspace, const Target& out) {
  run(plan, sum, workspace, Writer(add_base ? sum.base : nullptr, out));
}

double high_pass_magnitude(const HighPass& plan, const TaskVectorSum& sum, float* workspace) {
  return run(plan, sum, workspace, Magnitude());
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
