#include "freemerge/drop_mask.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// Counters worked on at once, each with words of its own in four arrays: vertical operations whatever the register.
constexpr std::size_t COUNTERS = 16, WORDS = 4 * COUNTERS;

struct Philox {
  std::uint32_t key[2];

  // words[w][c] = word w of the counter first + c
  void draw(std::uint64_t first, std::uint32_t words[4][COUNTERS]) const {
    for (std::size_t c = 0; c < COUNTERS; ++c) {
      words[0][c] = static_cast<std::uint32_t>(first + c);
      words[1][c] = static_cast<std::uint32_t>((first + c) >> 32);
      words[2][c] = words[3][c] = 0;
    }
    std::uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (std::size_t c = 0; c < COUNTERS; ++c) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * words[0][c], p1 = std::uint64_t{0xCD9E8D57u} * words[2][c];
        words[0][c] = static_cast<std::uint32_t>(p1 >> 32) ^ words[1][c] ^ k0;
        words[2][c] = static_cast<std::uint32_t>(p0 >> 32) ^ words[3][c] ^ k1;
        words[1][c] = static_cast<std::uint32_t>(p1);
        words[3][c] = static_cast<std::uint32_t>(p0);
      }
    }
  }
};

// A word is kept if it is below this. 2^32 keeps all, so it takes more than 32 bits.
std::uint64_t limit_of(double probability) { return static_cast<std::uint64_t>(std::floor(probability * 4294967296.0)); }

// The bits of the next WORDS entries: two counters a byte.
void keep_below(const std::uint32_t words[4][COUNTERS], std::uint32_t limit, std::uint8_t* bytes) {
  std::uint32_t nibbles[COUNTERS];
  for (std::size_t c = 0; c < COUNTERS; ++c) {
    nibbles[c] = (words[0][c] < limit ? 1u : 0u) | (words[1][c] < limit ? 2u : 0u) | (words[2][c] < limit ? 4u : 0u) |
                 (words[3][c] < limit ? 8u : 0u);
  }
  for (std::size_t i = 0; i < COUNTERS / 2; ++i) bytes[i] = static_cast<std::uint8_t>(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
}

void clear_after(std::size_t n, std::uint8_t* mask) {
  if (n % 8 != 0) mask[n / 8] &= static_cast<std::uint8_t>((1 << n % 8) - 1);
}

// Keeps the entries of a line whose word is below the limit of their rank. Buckets of magnitudes bound the ranks, which settles
// nearly every entry; the few buckets with an entry that is not settled are put in order.
class Ranked {
 public:
  Ranked(const std::vector<std::uint64_t>& limits) : limits_(limits), starts_(BUCKETS + 1), next_(BUCKETS), keys_(limits.size()) {}

  Magnitude* keys() { return keys_.data(); }

  // kept[i * stride] = whether words[i * stride] is below the limit of the rank of keys()[i]
  void keep(const std::uint32_t* words, std::size_t stride, std::uint8_t* kept) {
    const auto [lowest, highest] = count();
    open_.clear();
    for (std::size_t i = 0; i < keys_.size(); ++i) {
      const Magnitude bucket = keys_[i] >> SHIFT;
      const std::uint32_t word = words[i * stride];
      kept[i * stride] = word < limits_[starts_[bucket]];
      const bool settled = kept[i * stride] | (word >= limits_[starts_[bucket + 1] - 1]);
      if (!settled && next_[bucket] != OPEN) {
        next_[bucket] = OPEN;
        open_.push_back(bucket);
      }
    }
    if (!open_.empty()) put_in_order(words, stride, kept);
    std::fill(starts_.begin() + lowest, starts_.begin() + highest + 2, 0u);
    std::fill(next_.begin() + lowest, next_.begin() + highest + 1, 0u);
  }

 private:
  static constexpr int SHIFT = 18;  // exponent and 5 bits of the mantissa
  static constexpr std::size_t BUCKETS = (INFINITE >> SHIFT) + 1;
  static constexpr std::uint32_t OPEN = 0xffffffff;

  // starts_[b] = how many entries lie in the buckets before b. Answers the first and the last bucket that is not empty.
  std::pair<Magnitude, Magnitude> count() {
    Magnitude least = INFINITE, most = 0;
    for (const Magnitude key : keys_) least = std::min(least, key), most = std::max(most, key);
    const Magnitude lowest = least >> SHIFT, highest = most >> SHIFT;
    for (const Magnitude key : keys_) ++starts_[key >> SHIFT];
    std::uint32_t before = 0;
    for (Magnitude bucket = lowest; bucket <= highest + 1; ++bucket) before += std::exchange(starts_[bucket], before);
    return {lowest, highest};
  }

  void put_in_order(const std::uint32_t* words, std::size_t stride, std::uint8_t* kept) {
    std::uint32_t room = 0;
    for (const Magnitude bucket : open_) {
      next_[bucket] = room + 1;  // 0 is a bucket nobody asks about
      room += starts_[bucket + 1] - starts_[bucket];
    }
    entries_.resize(room);
    const std::size_t width = keys_.size();
    for (std::size_t i = width; i-- > 0;) {  // of equals, the last has the lowest rank
      std::uint32_t& place = next_[keys_[i] >> SHIFT];
      if (place != 0) entries_[place++ - 1] = static_cast<std::uint64_t>(keys_[i]) << 32 | static_cast<std::uint32_t>(width - 1 - i);
    }
    std::size_t first = 0;
    for (const Magnitude bucket : open_) {
      const std::size_t start = starts_[bucket], size = starts_[bucket + 1] - start;
      const auto begin = entries_.begin() + static_cast<std::ptrdiff_t>(first), end = begin + static_cast<std::ptrdiff_t>(size);
      if (!std::is_sorted(begin, end)) std::sort(begin, end);
      for (std::size_t rank = 0; rank < size; ++rank) {
        const std::size_t i = (width - 1 - static_cast<std::uint32_t>(begin[static_cast<std::ptrdiff_t>(rank)])) * stride;
        kept[i] = words[i] < limits_[start + rank];
      }
      first += size;
    }
  }

  const std::vector<std::uint64_t>& limits_;
  std::vector<std::uint32_t> starts_, next_;
  std::vector<Magnitude> keys_, open_;
  std::vector<std::uint64_t> entries_;
};

// A run of entries of a tensor: their magnitudes and their words.
struct Run {
  std::vector<Magnitude> magnitudes;
  std::vector<std::uint32_t> words;
  std::size_t skipped = 0;  // words before the first entry's

  void load(const Source& base, const Source& expert, const Philox& philox, std::size_t start, std::size_t n) {
    alignas(64) float tile[TILE];
    magnitudes.resize(n);
    for (std::size_t done = 0; done < n; done += TILE) {
      const std::size_t count = std::min(TILE, n - done);
      task_vector_tile(base, expert, start + done, count, tile);
      for (std::size_t i = 0; i < count; ++i) magnitudes[done + i] = magnitude_of(tile[i]);
    }
    skipped = start % 4;
    words.resize(n + skipped + WORDS);
    for (std::size_t done = 0; done < n + skipped; done += WORDS) {
      std::uint32_t drawn[4][COUNTERS];
      philox.draw((start + done) / 4, drawn);
      for (std::size_t c = 0; c < COUNTERS; ++c)
        for (std::size_t word = 0; word < 4; ++word) words[done + 4 * c + word] = drawn[word][c];
    }
  }
};

}  // namespace

void drop_mask(std::size_t n, double probability, const std::uint32_t* key, std::uint8_t* mask) {
  const Philox philox{{key[0], key[1]}};
  const std::uint64_t limit = limit_of(probability);
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    if (limit > 0xffffffffu) {
      std::fill(mask + chunk * CHUNK / 8, mask + (end + 7) / 8, std::uint8_t{0xff});
      return;
    }
    for (std::size_t start = chunk * CHUNK; start < end; start += WORDS) {
      std::uint32_t words[4][COUNTERS];
      std::uint8_t bytes[WORDS / 8];
      philox.draw(start / 4, words);
      keep_below(words, static_cast<std::uint32_t>(limit), bytes);
      std::copy_n(bytes, (std::min(WORDS, end - start) + 7) / 8, mask + start / 8);
    }
  });
  clear_after(n, mask);
}

// Eight blocks of width x stride entries have whole bytes of the mask.
void ranked_drop_mask(const Source& base, const Source& expert, std::size_t count, std::size_t width, std::size_t stride,
                      double density, double epsilon, const std::uint32_t* key, std::uint8_t* mask) {
  const std::size_t block = width * stride;
  if (count == 0 || block == 0) return;
  const Philox philox{{key[0], key[1]}};
  std::vector<std::uint64_t> limits(width);
  for (std::size_t rank = 0; rank < width; ++rank) {
    const double rise = 2 * epsilon * static_cast<double>(rank) / static_cast<double>(width - 1);
    limits[rank] = limit_of(width == 1 ? density : density - epsilon + rise);
  }
  const std::size_t at_once = std::max<std::size_t>(1, CHUNK / 8 / block) * 8;
  parallel_for((count + at_once - 1) / at_once, [&](std::size_t unit) {
    const std::size_t first = unit * at_once, last = std::min(count, first + at_once);
    Ranked ranked(limits);
    Run run;
    std::vector<std::uint8_t> kept((last - first) * block + 8);  // a byte an entry, and then a bit
    for (std::size_t start = first * block; start < last * block; start += block) {
      run.load(base, expert, philox, start, block);
      for (std::size_t line = 0; line < stride; ++line) {
        for (std::size_t i = 0; i < width; ++i) ranked.keys()[i] = run.magnitudes[i * stride + line];
        ranked.keep(run.words.data() + run.skipped + line, stride, kept.data() + (start - first * block) + line);
      }
    }
    for (std::size_t byte = 0; byte < ((last - first) * block + 7) / 8; ++byte) {
      unsigned bits = 0;
      for (int bit = 0; bit < 8; ++bit) bits |= static_cast<unsigned>(kept[8 * byte + bit]) << bit;
      mask[first * block / 8 + byte] = static_cast<std::uint8_t>(bits);
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
