#include "freemerge/weighted_sum.h"

#include <algorithm>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

static void sum_tile(const Source* arrays, const float* weights, int T, std::size_t start, std::size_t n, const Target& out) {
  alignas(64) float tile[TILE], total[TILE];
  std::fill_n(total, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    load_tile(arrays[t].at(start), arrays[t].dtype, n, tile);
    const float weight = weights[t];
    for (std::size_t i = 0; i < n; ++i) total[i] += weight * tile[i];
  }
  store_tile(total, n, out.dtype, out.at(start));
}

void weighted_sum(const Source* arrays, const float* weights, int T, std::size_t n, const Target& out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      sum_tile(arrays, weights, T, start, std::min(TILE, end - start), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
