#include "freemerge/drop_mask.h"

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

// A line of entries with the order of their magnitudes, by counting their digits from the last to the first.
class Ranking {
 public:
  explicit Ranking(std::size_t width) : keys_(width), order_(width), spare_(width) {}

  Magnitude* keys() { return keys_.data(); }

  // Indices by ascending magnitude; of equals, the last comes first.
  const std::vector<std::uint32_t>& order() {
    const std::size_t n = order_.size();
    for (std::size_t i = 0; i < n; ++i) order_[i] = static_cast<std::uint32_t>(n - 1 - i);
    Magnitude any = 0, all = -1;
    for (const Magnitude key : keys_) any |= key, all &= key;
    for (int shift = 0; shift < 31; shift += BITS)
      if ((any ^ all) >> shift & (DIGITS - 1)) sort_by(shift);  // a bfloat16 difference often has zeros below
    return order_;
  }

 private:
  static constexpr int BITS = 11;
  static constexpr Magnitude DIGITS = 1 << BITS;

  void sort_by(int shift) {
    std::uint32_t starts[DIGITS] = {};
    for (const Magnitude key : keys_) ++starts[key >> shift & (DIGITS - 1)];
    std::uint32_t next = 0;
    for (std::uint32_t& start : starts) next += std::exchange(start, next);
    for (const std::uint32_t index : order_) spare_[starts[keys_[index] >> shift & (DIGITS - 1)]++] = index;
    order_.swap(spare_);
  }

  std::vector<Magnitude> keys_;
  std::vector<std::uint32_t> order_, spare_;
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
    std::fill(mask + first * block / 8, mask + (last * block + 7) / 8, std::uint8_t{0});
    Ranking ranking(width);
    Run run;
    for (std::size_t start = first * block; start < last * block; start += block) {
      run.load(base, expert, philox, start, block);
      for (std::size_t line = 0; line < stride; ++line) {
        for (std::size_t i = 0; i < width; ++i) ranking.keys()[i] = run.magnitudes[i * stride + line];
        const std::vector<std::uint32_t>& order = ranking.order();
        for (std::size_t rank = 0; rank < width; ++rank) {
          const std::size_t i = order[rank] * stride + line, at = start + i;
          mask[at / 8] |= static_cast<std::uint8_t>((run.words[run.skipped + i] < limits[rank]) << at % 8);
        }
      }
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
