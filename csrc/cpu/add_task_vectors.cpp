#include "freemerge/add_task_vectors.h"

#include <algorithm>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

static void add_tile(const Source& base, const Source* experts, const float* weights, int T, std::size_t start, std::size_t n,
                     const Target& out) {
  alignas(64) float base_tile[TILE], task_vector[TILE], total[TILE];
  load_tile(base.at(start), base.dtype, n, base_tile);
  std::fill_n(total, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    task_vector_tile(base, base_tile, experts[t], start, n, task_vector);
    const float weight = weights[t];
    for (std::size_t i = 0; i < n; ++i) total[i] += weight * task_vector[i];
  }
  store_sum_tile(base, base_tile, total, start, n, out);
}

void add_task_vectors(const Source& base, const Source* experts, const float* weights, int T, std::size_t n, const Target& out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      add_tile(base, experts, weights, T, start, std::min(TILE, end - start), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
