#include "freemerge/near_swap.h"

#include <algorithm>
#include <cmath>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

static void swap_tile(const Source& base, const Source& expert, std::size_t start, std::size_t n, float t, const Target& out) {
  alignas(64) float left[TILE], right[TILE];
  load_tile(base.at(start), base.dtype, n, left);
  load_tile(expert.at(start), expert.dtype, n, right);
  for (std::size_t i = 0; i < n; ++i) {
    float difference = std::fabs(left[i] - right[i]);
    difference = difference < 1e-6f ? 1e-6f : difference;
    float share = t / difference;
    share = share < 0 ? 0.0f : share;
    share = share > 1 ? 1.0f : share;
    left[i] = share * right[i] + (1 - share) * left[i];
  }
  store_tile(left, n, out.dtype, out.at(start));
}

void near_swap(const Source& base, const Source& expert, std::size_t n, float t, const Target& out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      swap_tile(base, expert, start, std::min(TILE, end - start), t, out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
