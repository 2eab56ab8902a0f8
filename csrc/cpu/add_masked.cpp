#include "freemerge/add_masked.h"

#include <algorithm>
#include <vector>

#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// The masked task vectors of one tile, of all experts: they are looked at twice, by the election and by the sum.
struct Entries {
  alignas(64) float values[TILE];
  alignas(64) Keep keep[TILE];
};

struct Sum {
  const Source& base;
  const Source* experts;
  const std::uint8_t* const* masks;
  const float *weights, *votes, *shares;
  int T;
  float least, scaling;

  void tile(std::size_t start, std::size_t n, Entries* entries, const Target& out) const {
    alignas(64) float base_tile[TILE], total[TILE], divisor[TILE];
    load_tile(base.at(start), base.dtype, n, base_tile);
    for (int t = 0; t < T; ++t) load(t, start, n, base_tile, entries[t]);
    if (votes) elect(entries, n);
    std::fill_n(total, n, 0.0f);
    for (int t = 0; t < T; ++t) {
      const float weight = weights[t];
      const Entries& own = entries[t];
      for (std::size_t i = 0; i < n; ++i) total[i] += masked(weight * own.values[i], own.keep[i]);
    }
    if (shares) {
      add_shares(entries, n, divisor);
      for (std::size_t i = 0; i < n; ++i) total[i] /= divisor[i];
    }
    for (std::size_t i = 0; i < n; ++i) total[i] *= scaling;
    store_sum_tile(base, base_tile, total, start, n, out);
  }

 private:
  void load(int t, std::size_t start, std::size_t n, const float* base_tile, Entries& own) const {
    task_vector_tile(base, base_tile, experts[t], start, n, own.values);
    if (!masks[t]) {
      std::fill_n(own.keep, n, Keep{-1});
      return;
    }
    unpack_tile(masks[t], start, n, own.keep);
    for (std::size_t i = 0; i < n; ++i) own.values[i] = masked(own.values[i], own.keep[i]);
  }

  void elect(Entries* entries, std::size_t n) const {
    alignas(64) float sign[TILE];
    std::fill_n(sign, n, 0.0f);
    for (int t = 0; t < T; ++t)
      for (std::size_t i = 0; i < n; ++i) sign[i] += votes[t] * entries[t].values[i];
    for (std::size_t i = 0; i < n; ++i) sign[i] = sign[i] >= 0 ? 1.0f : -1.0f;
    for (int t = 0; t < T; ++t) {
      const float vote = votes[t];
      Entries& own = entries[t];
      for (std::size_t i = 0; i < n; ++i) own.keep[i] = -(vote * own.values[i] * sign[i] > 0);
    }
  }

  void add_shares(const Entries* entries, std::size_t n, float* divisor) const {
    std::fill_n(divisor, n, 0.0f);
    for (int t = 0; t < T; ++t) {
      const float share = shares[t];
      for (std::size_t i = 0; i < n; ++i) divisor[i] += masked(share, entries[t].keep[i]);
    }
    for (std::size_t i = 0; i < n; ++i) divisor[i] = divisor[i] == 0 ? 1.0f : divisor[i];
    if (least > 0)
      for (std::size_t i = 0; i < n; ++i) divisor[i] = std::max(divisor[i], least);
  }
};

}  // namespace

void add_masked(const Source& base, const Source* experts, const std::uint8_t* const* masks, const float* weights, const float* votes,
                const float* shares, int T, std::size_t n, float least, float scaling, const Target& out) {
  const Sum sum{base, experts, masks, weights, votes, shares, T, least, scaling};
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::vector<Entries> entries(static_cast<std::size_t>(T));
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      sum.tile(start, std::min(TILE, end - start), entries.data(), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
