#include "freemerge/add_masked.h"

#include <algorithm>
#include <vector>

#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

struct Sum {
  const Source& base;
  const Source* experts;
  const std::uint8_t* const* masks;
  const float *weights, *votes, *shares;
  int T;
  float least, scaling;

  // `entries` holds a tile of the masked task vector of every expert: the election and the sum both look at them.
  void tile(std::size_t start, std::size_t n, float* entries, const Target& out) const {
    alignas(64) float base_tile[TILE], total[TILE], divisor[TILE];
    load_tile(base.at(start), base.dtype, n, base_tile);
    for (int t = 0; t < T; ++t) load(t, start, n, base_tile, entries + t * TILE);
    std::fill_n(total, n, 0.0f);
    std::fill_n(divisor, n, 0.0f);
    if (votes) add_elected(entries, n, total, divisor);
    else add_all(entries, start, n, total, divisor);
    if (shares) divide(n, total, divisor);
    for (std::size_t i = 0; i < n; ++i) total[i] *= scaling;
    store_sum_tile(base, base_tile, total, start, n, out);
  }

 private:
  void load(int t, std::size_t start, std::size_t n, const float* base_tile, float* values) const {
    task_vector_tile(base, base_tile, experts[t], start, n, values);
    if (!masks[t]) return;
    alignas(64) Keep keep[KEEP_TILE];
    unpack_tile(masks[t], start, n, keep);
    for (std::size_t i = 0; i < n; ++i) values[i] = masked(values[i], keep[i]);
  }

  void add_elected(const float* entries, std::size_t n, float* total, float* divisor) const {
    alignas(64) float sign[TILE];
    std::fill_n(sign, n, 0.0f);
    for (int t = 0; t < T; ++t)
      for (std::size_t i = 0; i < n; ++i) sign[i] += votes[t] * entries[t * TILE + i];
    for (std::size_t i = 0; i < n; ++i) sign[i] = sign[i] >= 0 ? 1.0f : -1.0f;
    for (int t = 0; t < T; ++t) {
      const float *values = entries + t * TILE, vote = votes[t], weight = weights[t], share = shares ? shares[t] : 0.0f;
      for (std::size_t i = 0; i < n; ++i) {
        const bool agrees = vote * values[i] * sign[i] > 0;
        total[i] += agrees ? weight * values[i] : 0.0f;
        divisor[i] += agrees ? share : 0.0f;
      }
    }
  }

  void add_all(const float* entries, std::size_t start, std::size_t n, float* total, float* divisor) const {
    alignas(64) Keep keep[KEEP_TILE];
    for (int t = 0; t < T; ++t) {
      const float *values = entries + t * TILE, weight = weights[t];
      for (std::size_t i = 0; i < n; ++i) total[i] += weight * values[i];
      if (!shares) continue;
      if (masks[t]) unpack_tile(masks[t], start, n, keep);
      else std::fill_n(keep, n, Keep{-1});
      for (std::size_t i = 0; i < n; ++i) divisor[i] += masked(shares[t], keep[i]);
    }
  }

  void divide(std::size_t n, float* total, float* divisor) const {
    for (std::size_t i = 0; i < n; ++i) divisor[i] = divisor[i] == 0 ? 1.0f : divisor[i];
    if (least > 0)
      for (std::size_t i = 0; i < n; ++i) divisor[i] = std::max(divisor[i], least);
    for (std::size_t i = 0; i < n; ++i) total[i] /= divisor[i];
  }
};

}  // namespace

void add_masked(const Source& base, const Source* experts, const std::uint8_t* const* masks, const float* weights, const float* votes,
                const float* shares, int T, std::size_t n, float least, float scaling, const Target& out) {
  const Sum sum{base, experts, masks, weights, votes, shares, T, least, scaling};
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::vector<float> entries(static_cast<std::size_t>(T) * TILE);
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      sum.tile(start, std::min(TILE, end - start), entries.data(), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
