#include "freemerge/add_task_vectors.h"

#include <algorithm>

#include "freemerge/bf16_pairs.h"
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

// The common case, every array bfloat16: from load to store in registers. The arithmetic is that of add_tile.
// Answers how many elements it did; the few left over are not worth a loop of their own.
static std::size_t add_bf16(const Source& base, const Source* experts, const float* weights, int T, std::size_t start, std::size_t n,
                            const Target& out) {
  constexpr std::size_t COUNT = Bf16Pairs::COUNT, STEP = 2 * COUNT;
  const std::size_t done = n / STEP * STEP;
  for (const std::size_t end = start + done; start < end; start += STEP) {
    Bf16Pairs begin[2], total[2] = {};
    for (int half = 0; half < 2; ++half) begin[half].load(base.at(start + half * COUNT));
    for (int t = 0; t < T; ++t) {
      for (int half = 0; half < 2; ++half) {
        Bf16Pairs expert;
        expert.load(experts[t].at(start + half * COUNT));
        total[half].even += weights[t] * (expert.even - begin[half].even);
        total[half].odd += weights[t] * (expert.odd - begin[half].odd);
      }
    }
    for (int half = 0; half < 2; ++half) {
      total[half].even += begin[half].even;
      total[half].odd += begin[half].odd;
      total[half].store(out.at(start + half * COUNT));
    }
  }
  return done;
}

static bool all_bf16(const Source& base, const Source* experts, int T, const Target& out) {
  return base.dtype == DType::bf16 && out.dtype == DType::bf16 &&
         std::all_of(experts, experts + T, [](const Source& expert) { return expert.dtype == DType::bf16; });
}

void add_task_vectors(const Source& base, const Source* experts, const float* weights, int T, std::size_t n, const Target& out) {
  const bool pairs = all_bf16(base, experts, T, out);
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::size_t start = chunk * CHUNK;
    const std::size_t end = std::min(n, start + CHUNK);
    if (pairs) start += add_bf16(base, experts, weights, T, start, end - start, out);
    for (; start < end; start += TILE) add_tile(base, experts, weights, T, start, std::min(TILE, end - start), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
