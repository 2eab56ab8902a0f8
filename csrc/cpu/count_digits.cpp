#include "freemerge/count_digits.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

constexpr std::uint32_t SIGN = 0x80000000u;
constexpr std::size_t BLOCKS = 32;  // histograms a call clears and adds up, at most
constexpr std::size_t WAYS = 4;     // counters of a digit, used in turn: neighbours often have the same one

inline std::uint32_t key_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | SIGN);
}

struct Digit {
  std::uint32_t found;
  int below, width;
  bool magnitudes;

  void keys(const float* tile, std::size_t n, std::uint32_t* out) const {
    if (magnitudes)
      for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<std::uint32_t>(magnitude_of(tile[i])) | SIGN;
    else
      for (std::size_t i = 0; i < n; ++i) out[i] = key_of(tile[i]);
  }

  // Overwrites `keys`.
  void count(std::uint32_t* keys, std::size_t n, std::uint32_t* counts) const {
    if (below + width < 32) n = gather(keys, n);
    const std::uint32_t mask = (1u << width) - 1;
    for (std::size_t i = 0; i < n; ++i) keys[i] = (keys[i] >> below & mask) * WAYS + i % WAYS;
    for (std::size_t i = 0; i < n; ++i) ++counts[keys[i]];
  }

 private:
  // Brings the keys that begin with what is found to the front, in groups: most have none. Answers how many there are.
  std::size_t gather(std::uint32_t* keys, std::size_t n) const {
    const int above = below + width;
    const std::uint32_t begin = found >> above;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; i += GROUP) {
      const std::size_t end = std::min(n, i + GROUP);
      if (end - i == GROUP && !any_begins(keys + i, above, begin)) continue;
      for (std::size_t j = i; j < end; ++j) {  // without a branch that would be guessed wrong
        const std::uint32_t key = keys[j];
        keys[kept] = key;
        kept += key >> above == begin;
      }
    }
    return kept;
  }

  static bool any_begins(const std::uint32_t* keys, int above, std::uint32_t begin) {
    std::uint32_t hits = 0;
    for (std::size_t i = 0; i < GROUP; ++i) hits |= keys[i] >> above == begin;
    return hits != 0;
  }
};

}  // namespace

void count_digits(const Source& base, const Source& expert, std::size_t n, std::uint32_t found, int below, int width, bool magnitudes,
                  std::int64_t* counts) {
  const Digit digit{found, below, width, magnitudes};
  const std::size_t bins = std::size_t{1} << width, chunks = (n + CHUNK - 1) / CHUNK;
  const std::size_t length = (chunks + BLOCKS - 1) / BLOCKS * CHUNK;
  std::mutex mutex;
  std::fill_n(counts, bins, 0);
  parallel_for(n == 0 ? 0 : (n + length - 1) / length, [&](std::size_t block) {
    std::vector<std::uint32_t> mine(bins * WAYS);
    alignas(64) float tile[TILE];
    alignas(64) std::uint32_t keys[TILE];
    const std::size_t end = std::min(n, (block + 1) * length);
    for (std::size_t start = block * length; start < end; start += TILE) {
      const std::size_t size = std::min(TILE, end - start);
      task_vector_tile(base, expert, start, size, tile);
      digit.keys(tile, size, keys);
      digit.count(keys, size, mine.data());
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (std::size_t i = 0; i < mine.size(); ++i) counts[i / WAYS] += mine[i];
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
