#include "freemerge/add_elected.h"

#include <algorithm>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

struct ElectedTile {
  alignas(64) float total[TILE], agreeing[TILE];
};

// total = the sum of the weighted task vectors of the elected sign, agreeing = the sum of their weights
static void elect_tile(const Source* task_vectors, const float* weights, int T, std::size_t start, std::size_t n, ElectedTile& elected) {
  alignas(64) float values[TILE], sign[TILE];
  const auto load = [&](int t) { load_tile(task_vectors[t].at(start), task_vectors[t].dtype, n, values); };
  std::fill_n(sign, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    load(t);
    for (std::size_t i = 0; i < n; ++i) sign[i] += weights[t] * values[i];
  }
  for (std::size_t i = 0; i < n; ++i) sign[i] = sign[i] >= 0 ? 1.0f : -1.0f;
  std::fill_n(elected.total, n, 0.0f);
  std::fill_n(elected.agreeing, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    load(t);
    const float weight = weights[t];
    for (std::size_t i = 0; i < n; ++i) {
      const float value = weight * values[i];
      const bool agrees = value * sign[i] > 0;
      elected.total[i] += agrees ? value : 0.0f;
      elected.agreeing[i] += agrees ? weight : 0.0f;
    }
  }
}

void add_elected(const Source& base, const Source* task_vectors, const float* weights, int T, std::size_t n, float scaling,
                 bool normalize, const Target& out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE) {
      const std::size_t count = std::min(TILE, end - start);
      ElectedTile elected;
      elect_tile(task_vectors, weights, T, start, count, elected);
      if (normalize)
        for (std::size_t i = 0; i < count; ++i) elected.total[i] /= elected.agreeing[i] == 0 ? 1.0f : elected.agreeing[i];
      for (std::size_t i = 0; i < count; ++i) elected.total[i] *= scaling;
      alignas(64) float base_tile[TILE];
      load_tile(base.at(start), base.dtype, count, base_tile);
      store_sum_tile(base, base_tile, elected.total, start, count, out);
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
