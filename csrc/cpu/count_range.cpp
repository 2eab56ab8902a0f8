#include "freemerge/count_range.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

constexpr std::size_t BLOCKS = 32;  // histograms a call clears and adds up, at most
constexpr std::uint32_t SIGN = 0x80000000u;

// Keys less 2^31, as vector units compare signed integers: of magnitudes these are the magnitudes' bits.
void load_keys(const float* tile, std::size_t n, bool magnitudes, std::int32_t* keys) {
  if (magnitudes) {
    for (std::size_t i = 0; i < n; ++i) keys[i] = magnitude_of(tile[i]);
  } else {
    std::memcpy(keys, tile, n * 4);
    for (std::size_t i = 0; i < n; ++i) keys[i] ^= keys[i] >> 31 & 0x7fffffff;
  }
}

struct Counter {
  std::int32_t first, last;
  int shift;
  std::vector<std::uint32_t> counts;  // below, in the bins, above

  Counter(const KeyRange& range, std::size_t bins)
      : first(static_cast<std::int32_t>(range.low ^ SIGN)),
        last(static_cast<std::int32_t>((range.low + ((static_cast<std::uint32_t>(bins) << range.shift) - 1)) ^ SIGN)),
        shift(range.shift), counts(bins + 2) {}

  void add(const std::int32_t* keys, std::size_t n) {
    alignas(64) Keep inside[KEEP_TILE];
    std::int32_t below = 0, above = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const bool under = keys[i] < first, over = keys[i] > last;
      below += under;
      above += over;
      inside[i] = -static_cast<Keep>(!(under | over));
    }
    counts.front() += static_cast<std::uint32_t>(below);
    counts.back() += static_cast<std::uint32_t>(above);
    std::uint64_t words[TILE / 64] = {};
    pack_tile(inside, n, reinterpret_cast<std::uint8_t*>(words), 0);
    for (std::size_t w = 0; w < TILE / 64; ++w)
      for (; words[w] != 0; words[w] &= words[w] - 1) count(keys[64 * w + __builtin_ctzll(words[w])]);
  }

 private:
  void count(std::int32_t key) { ++counts[1 + ((static_cast<std::uint32_t>(key) - static_cast<std::uint32_t>(first)) >> shift)]; }
};

}  // namespace

void count_range(const Source& base, const Source& expert, std::size_t n, const KeyRange* ranges, std::size_t count, std::size_t bins,
                 bool magnitudes, std::int64_t* counts) {
  const std::size_t chunks = (n + CHUNK - 1) / CHUNK, length = (chunks + BLOCKS - 1) / BLOCKS * CHUNK;
  std::mutex mutex;
  std::fill_n(counts, count * (bins + 2), 0);
  parallel_for(n == 0 ? 0 : (n + length - 1) / length, [&](std::size_t block) {
    std::vector<Counter> counters;
    for (std::size_t range = 0; range < count; ++range) counters.emplace_back(ranges[range], bins);
    alignas(64) float tile[TILE];
    alignas(64) std::int32_t keys[TILE];
    const std::size_t end = std::min(n, (block + 1) * length);
    for (std::size_t start = block * length; start < end; start += TILE) {
      const std::size_t size = std::min(TILE, end - start);
      task_vector_tile(base, expert, start, size, tile);
      load_keys(tile, size, magnitudes, keys);
      for (Counter& counter : counters) counter.add(keys, size);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    std::int64_t* target = counts;
    for (const Counter& counter : counters)
      for (const std::uint32_t found : counter.counts) *target++ += found;
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
