#include "freemerge/task_vector_variance.h"

#include <algorithm>
#include <vector>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

static void variance_tile(const Source& base, const Source* experts, int T, std::size_t start, std::size_t n, float* vectors, float* out) {
  alignas(64) float base_tile[TILE], mean[TILE], sum[TILE];
  load_tile(base.at(start), base.dtype, n, base_tile);
  std::fill_n(mean, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    float* vector = vectors + t * TILE;
    task_vector_tile(base, base_tile, experts[t], start, n, vector);
    for (std::size_t i = 0; i < n; ++i) mean[i] += vector[i];
  }
  const auto count = static_cast<float>(T);
  for (std::size_t i = 0; i < n; ++i) mean[i] /= count;
  std::fill_n(sum, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    const float* vector = vectors + t * TILE;
    for (std::size_t i = 0; i < n; ++i) sum[i] += (vector[i] - mean[i]) * (vector[i] - mean[i]);
  }
  for (std::size_t i = 0; i < n; ++i) out[i] = sum[i] / count;
}

void task_vector_variance(const Source& base, const Source* experts, int T, std::size_t n, float* out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::vector<float> vectors(static_cast<std::size_t>(T) * TILE);
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      variance_tile(base, experts, T, start, std::min(TILE, end - start), vectors.data(), out + start);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
