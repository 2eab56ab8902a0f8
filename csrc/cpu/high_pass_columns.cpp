#include "freemerge/high_pass_columns.h"

#include "freemerge/gain.h"
#include "freemerge/scratch.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

Columns::Columns(const HighPass& plan) : plan_(plan) {
  const std::size_t length = plan.length();
  for (std::size_t v = 0; v < length; ++v) {
    const std::size_t mirrored = (length - v) % length;
    const Kind left = kind(v), right = kind(mirrored);
    const bool keep = left == Kind::keep && right == Kind::keep, drop = left == Kind::drop && right == Kind::drop;
    if (keep) kept_.push_back(static_cast<std::uint32_t>(v));
    if (v <= length / 2 && !keep && (plan.complement || !drop)) selected_.push_back(static_cast<std::uint32_t>(v));
  }
}

Columns::Kind Columns::kind(std::size_t v) const {
  const std::int32_t inner = plan_.inner[v], below = plan_.below[v], outer = plan_.outer[v];
  const auto farthest = static_cast<std::int32_t>(plan_.lines() / 2);
  const bool ring = outer > below;
  if (inner < 0 && !ring) return Kind::drop;
  const bool once = ring ? inner == below && outer == farthest : inner == farthest;
  return once ? Kind::keep : Kind::mixed;
}

void Columns::filter(float* spectrum, float less, float factor) const {
  const Transform& transform = Transform::of(plan_.lines());
  parallel_for(blocks(), [&](std::size_t block) {
    const Scratch scratch(transform.scratch_floats() * sizeof(float));
    float* x = spectrum + block * block_floats();
    transform.forward(x, scratch.floats());
    multiply(x, block, transform, less, factor);
    transform.inverse(x, scratch.floats());
  });
}

// The gain is symmetrised: (u, v) and its mirror image (-u, -v) each give half. They differ where a size is odd.
void Columns::multiply(float* x, std::size_t block, const Transform& transform, float less, float factor) const {
  alignas(64) std::int32_t inner[2][LANES], below[2][LANES], outer[2][LANES];
  for (std::size_t lane = 0; lane < LANES; ++lane) {
    const std::size_t index = block * LANES + lane, length = plan_.length();
    for (int side = 0; side < 2; ++side) {
      if (index >= selected_.size()) {
        inner[side][lane] = below[side][lane] = outer[side][lane] = -1;
        continue;
      }
      const std::size_t v = side == 0 ? selected_[index] : (length - selected_[index]) % length;
      inner[side][lane] = plan_.inner[v];
      below[side][lane] = plan_.below[v];
      outer[side][lane] = plan_.outer[v];
    }
  }
  const auto lines = static_cast<std::int32_t>(plan_.lines());
  for (std::int32_t u = 0; u < lines; ++u) {
    const std::int32_t here = distance(u, lines), there = mirrored_distance(u, lines);
    float* point = x + transform.position()[u] * POINT;
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      const std::int32_t twice =
          gain(here, inner[0][lane], below[0][lane], outer[0][lane]) + gain(there, inner[1][lane], below[1][lane], outer[1][lane]);
      const float scale = factor * (0.5f * static_cast<float>(twice) - less);
      point[lane] *= scale;
      point[LANES + lane] *= scale;
    }
  }
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
