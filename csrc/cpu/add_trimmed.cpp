#include "freemerge/add_trimmed.h"

#include <algorithm>
#include <vector>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

inline float absolute(float value) { return value < 0 ? -value : value; }

struct Trimmed {
  const Source& base;
  const Source* experts;
  const float* floors;
  int T;

  // A tile of every expert in `entries`, and their sums. `base_tile` is filled.
  void load(std::size_t start, std::size_t n, float* base_tile, float* entries, float* sums) const {
    load_tile(base.at(start), base.dtype, n, base_tile);
    std::fill_n(sums, n, 0.0f);
    for (int t = 0; t < T; ++t) {
      float *values = entries + t * TILE, floor = floors[t];
      task_vector_tile(base, base_tile, experts[t], start, n, values);
      for (std::size_t i = 0; i < n; ++i) {
        values[i] = absolute(values[i]) < floor ? 0.0f : values[i];
        sums[i] += values[i];
      }
    }
  }
};

// `signs` holds sums and is overwritten
void combine(const float* entries, int T, std::size_t n, float zeros, Combination combination, float* signs, float* total) {
  alignas(64) float count[TILE];
  for (std::size_t i = 0; i < n; ++i) signs[i] = signs[i] > 0 ? 1.0f : signs[i] == 0 ? zeros : -1.0f;
  std::fill_n(total, n, 0.0f);
  std::fill_n(count, n, 0.0f);
  for (int t = 0; t < T; ++t) {
    const float* values = entries + t * TILE;
    for (std::size_t i = 0; i < n; ++i) {
      const float side = signs[i] > 0 ? 1.0f : -1.0f;
      const bool agrees = values[i] * side > 0;
      if (combination == Combination::max) total[i] = std::max(total[i], agrees ? absolute(values[i]) : 0.0f);
      else total[i] += agrees ? values[i] : 0.0f;
      count[i] += agrees ? 1.0f : 0.0f;
    }
  }
  if (combination == Combination::mean)
    for (std::size_t i = 0; i < n; ++i) total[i] /= std::max(count[i], 1.0f);
  if (combination == Combination::max)
    for (std::size_t i = 0; i < n; ++i) total[i] *= signs[i];
}

}  // namespace

void add_trimmed(const Source& base, const Source* experts, const float* floors, int T, std::size_t n, float zeros,
                 Combination combination, float scaling, const Target& out) {
  const Trimmed trimmed{base, experts, floors, T};
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::vector<float> entries(static_cast<std::size_t>(T) * TILE);
    alignas(64) float base_tile[TILE], sums[TILE], total[TILE];
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE) {
      const std::size_t size = std::min(TILE, end - start);
      trimmed.load(start, size, base_tile, entries.data(), sums);
      combine(entries.data(), T, size, zeros, combination, sums, total);
      for (std::size_t i = 0; i < size; ++i) total[i] *= scaling;
      store_sum_tile(base, base_tile, total, start, size, out);
    }
  });
}

std::int64_t sign_majority(const Source& base, const Source* experts, const float* floors, int T, std::size_t n) {
  const Trimmed trimmed{base, experts, floors, T};
  std::vector<std::int64_t> chunks((n + CHUNK - 1) / CHUNK);
  parallel_for(chunks.size(), [&](std::size_t chunk) {
    std::vector<float> entries(static_cast<std::size_t>(T) * TILE);
    alignas(64) float base_tile[TILE], sums[TILE];
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE) {
      const std::size_t size = std::min(TILE, end - start);
      trimmed.load(start, size, base_tile, entries.data(), sums);
      std::int32_t balance = 0;
      for (std::size_t i = 0; i < size; ++i) balance += (sums[i] > 0) - (sums[i] < 0);
      chunks[chunk] += balance;
    }
  });
  std::int64_t balance = 0;
  for (const std::int64_t chunk : chunks) balance += chunk;
  return balance;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
