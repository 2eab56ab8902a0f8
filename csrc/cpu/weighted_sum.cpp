#include "freemerge/weighted_sum.h"

#include <algorithm>

#include "freemerge/bf16_pairs.h"
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

// The common case, every array bfloat16, as in add_task_vectors.cpp. Answers how many elements it did.
static std::size_t sum_bf16(const Source* arrays, const float* weights, int T, std::size_t start, std::size_t n, const Target& out) {
  constexpr std::size_t COUNT = Bf16Pairs::COUNT;
  const std::size_t done = n / COUNT * COUNT;
  for (const std::size_t end = start + done; start < end; start += COUNT) {
    Bf16Pairs total = {};
    for (int t = 0; t < T; ++t) {
      Bf16Pairs array;
      array.load(arrays[t].at(start));
      total.even += weights[t] * array.even;
      total.odd += weights[t] * array.odd;
    }
    total.store(out.at(start));
  }
  return done;
}

void weighted_sum(const Source* arrays, const float* weights, int T, std::size_t n, const Target& out) {
  const bool pairs = out.dtype == DType::bf16 &&
                     std::all_of(arrays, arrays + T, [](const Source& array) { return array.dtype == DType::bf16; });
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::size_t start = chunk * CHUNK;
    const std::size_t end = std::min(n, start + CHUNK);
    if (pairs) start += sum_bf16(arrays, weights, T, start, end - start, out);
    for (; start < end; start += TILE) sum_tile(arrays, weights, T, start, std::min(TILE, end - start), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
