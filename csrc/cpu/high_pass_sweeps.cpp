#include <algorithm>
#include <cstring>
#include <numeric>

#include "freemerge/high_pass_forms.h"
#include "freemerge/scratch.h"
#include "freemerge/simd.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

class Sweeps {
 public:
  Sweeps(const HighPass& plan, const Columns& columns, const Input& input, const Output& output, float* workspace)
      : plan_(plan), columns_(columns), lines_(plan, input, output), transform_(Transform::of(plan.length())),
        at_once_(Lines::at_once(plan)), selected_(workspace), kept_(workspace + columns.floats()) {}

  double run() {
    const std::size_t groups = groups_of(plan_.lines(), GROUP), units = groups_of(groups, at_once_);
    const auto size_of_unit = [=](std::size_t unit) { return std::min(at_once_, groups - unit * at_once_); };
    if (plan_.stored || !columns_.selected().empty())
      parallel_for(units, [&](std::size_t unit) { sweep_in(unit * at_once_, size_of_unit(unit)); });
    // half, because unpack() leaves out the halves of its sums
    columns_.filter(selected_, 0.0f, static_cast<float>(0.5 / plan_.lines()));
    std::vector<double> parts(units);
    parallel_for(units, [&](std::size_t unit) { parts[unit] = sweep_out(unit * at_once_, size_of_unit(unit)); });
    return std::accumulate(parts.begin(), parts.end(), 0.0);
  }

 private:
  // Groups of lines, and what Bluestein needs behind them
  struct Buffer {
    Buffer(const Transform& transform, std::size_t groups)
        : memory((groups * transform.size() * GROUP + transform.scratch_floats()) * sizeof(float)), x(memory.floats()),
          scratch(x + groups * transform.size() * GROUP) {}
    Scratch memory;
    float *x, *scratch;
  };

  void sweep_in(std::size_t first, std::size_t groups) {
    const Buffer buffer(transform_, at_once_);
    lines_.load(first, groups, buffer.x);
    for (std::size_t k = 0; k < groups; ++k) {
      float* x = buffer.x + k * plan_.length() * GROUP;
      transform_.forward(x, buffer.scratch);
      exchange<&Sweeps::unpack>(first + k, x);
      if (plan_.stored) keep(first + k, x);
    }
  }

  double sweep_out(std::size_t first, std::size_t groups) {
    const Buffer buffer(transform_, at_once_);
    if (!plan_.stored) lines_.load(first, groups, buffer.x);
    for (std::size_t k = 0; k < groups; ++k) {
      float* x = buffer.x + k * plan_.length() * GROUP;
      if (plan_.stored) {
        restore(first + k, x);
      } else {
        transform_.forward(x, buffer.scratch);
        drop(x);
      }
      exchange<&Sweeps::pack>(first + k, x);
      transform_.inverse(x, buffer.scratch);
    }
    return lines_.finish(first, groups, buffer.x, 1.0f / static_cast<float>(plan_.length()));
  }

  float* point(float* x, std::size_t v) const { return x + transform_.position()[v] * POINT; }
  std::size_t mirrored(std::size_t v) const { return (plan_.length() - v) % plan_.length(); }

  void keep(std::size_t group, float* x) const {
    float* target = kept_ + group * columns_.kept().size() * POINT;
    for (const std::size_t v : columns_.kept()) {
      std::memcpy(target, point(x, v), POINT * sizeof(float));
      target += POINT;
    }
  }

  void restore(std::size_t group, float* x) const {
    std::memset(x, 0, plan_.length() * POINT * sizeof(float));
    const float* source = kept_ + group * columns_.kept().size() * POINT;
    for (const std::size_t v : columns_.kept()) {
      std::memcpy(point(x, v), source, POINT * sizeof(float));
      source += POINT;
    }
  }

  void drop(float* x) const {
    auto kept = columns_.kept().begin();
    for (std::size_t v = 0; v < plan_.length(); ++v) {
      if (kept != columns_.kept().end() && *kept == v)
        ++kept;
      else
        std::memset(point(x, v), 0, POINT * sizeof(float));
    }
  }

  // A tile holds 16 selected columns of one group of lines, [real, imaginary][column][line]; in the workspace a line's 16 numbers are a point.
  template <void (Sweeps::*MOVE)(std::size_t, float*, float*) const>
  void exchange(std::size_t group, float* x) const {
    const std::size_t first = group * GROUP, lines = std::min(GROUP, plan_.lines() - first);
    constexpr bool IN = MOVE == &Sweeps::unpack;
    alignas(64) float tile[2][LANES * GROUP] = {}, points[GROUP * POINT] = {};   // absent lines and columns are 0
    for (std::size_t block = 0; block < columns_.blocks(); ++block) {
      float* target = selected_ + block * columns_.block_floats() + first * POINT;
      const std::size_t start = block * LANES, columns = std::min(LANES, columns_.selected().size() - start);
      if (IN)
        for (std::size_t c = 0; c < columns; ++c) (this->*MOVE)(columns_.selected()[start + c], x, tile[0] + c * GROUP);
      else
        std::memcpy(points, target, lines * POINT * sizeof(float));
      for (int part = 0; part < 2; ++part)
        for (std::size_t i = 0; i < LANES; i += 8)
          for (std::size_t j = 0; j < GROUP; j += 8) {
            float *columnwise = tile[part] + i * GROUP + j, *linewise = points + j * POINT + part * LANES + i;
            if (IN)
              transpose_8x8(columnwise, GROUP, linewise, POINT);
            else
              transpose_8x8(linewise, POINT, columnwise, GROUP);
          }
      if (IN)
        std::memcpy(target, points, lines * POINT * sizeof(float));
      else
        for (std::size_t c = 0; c < columns; ++c) (this->*MOVE)(columns_.selected()[start + c], x, tile[0] + c * GROUP);
    }
  }

  // Two real lines a, b ride as a + ib: A(v) = (Z(v) + conj Z(-v)) / 2, B(v) = (Z(v) - conj Z(-v)) / 2i. The halves are left to the gain.
  void unpack(std::size_t v, float* x, float* re) const {
    const float *z = point(x, v), *mirror = point(x, mirrored(v));
    float* im = re + LANES * GROUP;
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      re[lane] = z[lane] + mirror[lane];
      im[lane] = z[LANES + lane] - mirror[LANES + lane];
      re[LANES + lane] = z[LANES + lane] + mirror[LANES + lane];
      im[LANES + lane] = mirror[lane] - z[lane];
    }
  }

  void pack(std::size_t v, float* x, float* re) const {
    float *z = point(x, v), *mirror = point(x, mirrored(v));
    const float* im = re + LANES * GROUP;
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      mirror[lane] = re[lane] + im[LANES + lane];
      mirror[LANES + lane] = re[LANES + lane] - im[lane];
      z[lane] = re[lane] - im[LANES + lane];
      z[LANES + lane] = re[LANES + lane] + im[lane];
    }
  }

  const HighPass& plan_;
  const Columns& columns_;
  const Lines lines_;
  const Transform& transform_;
  const std::size_t at_once_;   // groups
  float *selected_, *kept_;
};

}  // namespace

double filter_by_sweeps(const HighPass& plan, const Columns& columns, const Input& input, const Output& output, float* workspace) {
  return Sweeps(plan, columns, input, output, workspace).run();
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
