#include "freemerge/add_masked.h"

#include <algorithm>
#include <vector>

#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

inline Eight load_eight(const float* source) {
  Eight values;
  std::memcpy(&values, source, sizeof values);
  return values;
}

inline Eight select(EightKept kept, Eight values) { return (Eight)((EightKept)values & kept); }

constexpr std::size_t AT_ONCE = 4;  // registers of eight entries

inline std::size_t end_of(std::size_t entries) { return (entries + 7) / 8; }  // of a mask's bytes

struct Sum {
  const Source& base;
  const Source* experts;
  const std::uint8_t* const* masks;
  const float *weights, *votes, *shares;
  int T;
  float least, scaling;

  // `entries` has room for a tile of every expert: the election and the sum both look at them.
  void tile(std::size_t start, std::size_t n, float* entries, const Target& out) const {
    alignas(64) float base_tile[TILE], total[TILE];
    load_tile(base.at(start), base.dtype, n, base_tile);
    for (int t = 0; t < T; ++t) task_vector_tile(base, base_tile, experts[t], start, n, entries + t * TILE);
    for (std::size_t i = 0; i < n; i += 8 * AT_ONCE) {  // beyond n: entries of an earlier tile, which nobody reads
      Eight sum[AT_ONCE] = {}, divisor[AT_ONCE] = {};
      if (votes) add_elected(entries + i, start + i, end_of(start + n), sum, divisor);
      else add_all(entries + i, start + i, end_of(start + n), sum, divisor);
      for (std::size_t u = 0; u < AT_ONCE; ++u) {
        if (shares) sum[u] /= at_least(divisor[u]);
        sum[u] *= scaling;
      }
      std::memcpy(total + i, sum, sizeof sum);
    }
    store_sum_tile(base, base_tile, total, start, n, out);
  }

 private:
  // kept[u] = of the 8 entries from start + 8 * u on
  void unpack_group(int t, std::size_t start, std::size_t end, EightKept* kept) const {
    if (!masks[t]) {
      std::fill_n(kept, AT_ONCE, ~EightKept{});
      return;
    }
    std::uint8_t bytes[AT_ONCE] = {};
    std::memcpy(bytes, masks[t] + start / 8, std::min(AT_ONCE, end - start / 8));
    for (std::size_t u = 0; u < AT_ONCE; ++u) kept[u] = unpack(bytes[u]);
  }

  void add_elected(float* entries, std::size_t start, std::size_t end, Eight* sum, Eight* divisor) const {
    Eight election[AT_ONCE] = {}, sign[AT_ONCE];
    EightKept keep[AT_ONCE];
    for (int t = 0; t < T; ++t) {
      unpack_group(t, start, end, keep);
      for (std::size_t u = 0; u < AT_ONCE; ++u) {
        const Eight values = select(keep[u], load_eight(entries + t * TILE + 8 * u));
        election[u] += votes[t] * values;
        std::memcpy(entries + t * TILE + 8 * u, &values, sizeof values);
      }
    }
    for (std::size_t u = 0; u < AT_ONCE; ++u) sign[u] = election[u] >= 0 ? Eight{} + 1.0f : Eight{} - 1.0f;
    for (int t = 0; t < T; ++t) {
      for (std::size_t u = 0; u < AT_ONCE; ++u) {
        const Eight values = load_eight(entries + t * TILE + 8 * u);
        const EightKept agrees = votes[t] * values * sign[u] > 0;
        sum[u] += select(agrees, weights[t] * values);
        if (shares) divisor[u] += select(agrees, Eight{} + shares[t]);
      }
    }
  }

  void add_all(const float* entries, std::size_t start, std::size_t end, Eight* sum, Eight* divisor) const {
    EightKept keep[AT_ONCE];
    for (int t = 0; t < T; ++t) {
      unpack_group(t, start, end, keep);
      for (std::size_t u = 0; u < AT_ONCE; ++u) {
        sum[u] += weights[t] * select(keep[u], load_eight(entries + t * TILE + 8 * u));
        if (shares) divisor[u] += select(keep[u], Eight{} + shares[t]);
      }
    }
  }

  Eight at_least(Eight divisor) const {
    divisor = divisor == 0 ? Eight{} + 1.0f : divisor;
    return least > 0 ? (divisor < least ? Eight{} + least : divisor) : divisor;
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
