#include <algorithm>
#include <vector>

#include "freemerge/drop_mask.h"
#include "freemerge/magnitude.h"
#include "freemerge/mask.h"
#include "freemerge/philox.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// Keeps the entries of a line whose word is below the limit of their rank. A word below the lowest limit, or not below the
// highest, settles its entry; so do, mostly, the bounds of its rank that counting magnitudes by their upper bits gives. Ranks
// are worked out for the few entries that are still open: of a bucket of equals, as mostly with bfloat16 weights, they are
// known from counting.
class RankedLine {
 public:
  explicit RankedLine(const std::vector<std::uint64_t>& limits)
      : limits_(limits), width_(limits.size()), fine_(width_ >= FINE), shift_(fine_ ? 16 : 17), last_(fine_ ? BUCKETS - 1 : BUCKETS / 2 - 1),
        buckets_(width_), after_(width_), contested_(width_ + 1), open_(width_ + 1) {}

  // kept[i] = all bits or none: words[i] is below the limit of the rank of magnitudes[i]
  void decide(const Magnitude* magnitudes, const std::uint32_t* words, Keep* kept) {
    magnitudes_ = magnitudes, words_ = words, kept_ = kept;
    const std::uint64_t lowest = limits_.front(), highest = limits_.back();
    for (std::size_t i = 0; i < width_; ++i) kept[i] = -static_cast<Keep>(words[i] < lowest);
    if (lowest > LOWER || lowest == highest) return;
    count();
    const std::size_t contested = find_contested(static_cast<std::uint32_t>(lowest), static_cast<std::uint32_t>(highest - lowest - 1));
    const std::size_t mixed = settle_equals(settle(contested));
    if (mixed > FEW) sort_line();
    for (std::size_t o = 0; o < mixed; ++o) keep(open_[o], mixed > FEW ? ranks_[open_[o]] : rank_of(open_[o]));
  }

 private:
  static constexpr std::size_t FINE = 4096;    // entries of a line from which on twice the buckets are worth it
  static constexpr std::size_t BUCKETS = 4096; // of a 128th of an octave (half as many: a 64th), what is much smaller in the first
  static constexpr std::size_t FEW = 64;       // entries to which the whole line is compared

  void keep(std::size_t i, std::size_t rank) { kept_[i] = -static_cast<Keep>(words_[i] < limits_[rank]); }

  // starts_[b] = how many entries lie in the buckets before b; after_[i] = how many in the same bucket come after the i-th
  void count() {
    Magnitude most = 0;
    for (std::size_t i = 0; i < width_; ++i) most = std::max(most, magnitudes_[i]);
    const int shift = shift_;
    const Magnitude before = std::max((most >> shift) - static_cast<Magnitude>(last_), 0);
    for (std::size_t i = 0; i < width_; ++i)
      buckets_[i] = static_cast<std::uint16_t>(std::max((magnitudes_[i] >> shift) - before, 0));
    std::fill_n(starts_, last_ + 2, 0u);
    for (std::size_t i = width_; i-- > 0;) after_[i] = starts_[buckets_[i] + 1]++;
    for (std::size_t bucket = 1; bucket <= last_; ++bucket) starts_[bucket + 1] += starts_[bucket];
  }

  std::size_t find_contested(std::uint32_t lowest, std::uint32_t span) {
    std::size_t found = 0;
    for (std::size_t i = 0; i < width_; ++i) {
      contested_[found] = static_cast<std::uint32_t>(i);
      found += words_[i] - lowest <= span;
    }
    return found;
  }

  // Answers how many are open.
  std::size_t settle(std::size_t contested) {
    std::size_t open = 0;
    for (std::size_t c = 0; c < contested; ++c) {
      const std::uint32_t i = contested_[c], bucket = buckets_[i];
      const bool keep = words_[i] < limits_[starts_[bucket]];
      kept_[i] = -static_cast<Keep>(keep);
      open_[open] = i;
      open += !keep & (words_[i] < limits_[starts_[bucket + 1] - 1]);
    }
    return open;
  }

  // Answers how many of the `open` are in buckets where not all are equal: they are still open.
  std::size_t settle_equals(std::size_t open) {
    std::size_t mixed = 0;
    for (std::size_t o = 0; o < open; ++o) state_[buckets_[open_[o]]] = State::unknown;
    for (std::size_t o = 0; o < open; ++o) {
      const std::uint32_t i = open_[o], bucket = buckets_[i];
      if (state_[bucket] == State::unknown)
        state_[bucket] = count_equal(magnitudes_[i]) == starts_[bucket + 1] - starts_[bucket] ? State::equals : State::mixed;
      if (state_[bucket] == State::equals) keep(i, starts_[bucket] + after_[i]);
      else open_[mixed++] = i;
    }
    return mixed;
  }

  std::size_t count_equal(Magnitude value) const {
    Magnitude count = 0;
    for (std::size_t i = 0; i < width_; ++i) count += magnitudes_[i] == value;
    return static_cast<std::size_t>(count);
  }

  // Of equals, the last has the lowest rank.
  std::size_t rank_of(std::size_t entry) const {
    const Magnitude own = magnitudes_[entry];
    Magnitude lower = 0;
    for (std::size_t i = 0; i < entry; ++i) lower += magnitudes_[i] < own;
    for (std::size_t i = entry + 1; i < width_; ++i) lower += magnitudes_[i] <= own;
    return static_cast<std::size_t>(lower);
  }

  void sort_line() {
    pairs_.resize(width_);
    ranks_.resize(width_);
    for (std::size_t i = 0; i < width_; ++i) pairs_[i] = static_cast<std::uint64_t>(magnitudes_[i]) << 32 | (width_ - 1 - i);
    std::sort(pairs_.begin(), pairs_.end());
    for (std::size_t rank = 0; rank < width_; ++rank) ranks_[width_ - 1 - (pairs_[rank] & LOWER)] = static_cast<std::uint32_t>(rank);
  }

  enum class State : std::uint8_t { unknown, equals, mixed };

  const std::vector<std::uint64_t>& limits_;
  const std::size_t width_;
  const bool fine_;
  const int shift_;
  const std::size_t last_;
  const Magnitude* magnitudes_ = nullptr;
  const std::uint32_t* words_ = nullptr;
  Keep* kept_ = nullptr;
  std::vector<std::uint16_t> buckets_;
  std::vector<std::uint32_t> after_, contested_, open_, ranks_;
  std::vector<std::uint64_t> pairs_;
  std::uint32_t starts_[BUCKETS + 1];
  State state_[BUCKETS];
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
    words.resize(n + skipped + Philox::WORDS);
    for (std::size_t done = 0; done < n + skipped; done += Philox::WORDS) philox.draw((start + done) / 4, words.data() + done);
  }
};

// The lines of a run whose entries are `stride` apart.
void decide_across(const Run& run, std::size_t width, std::size_t stride, RankedLine& line, Keep* kept) {
  std::vector<Magnitude> magnitudes(width);
  std::vector<std::uint32_t> words(width);
  std::vector<Keep> own(width);
  for (std::size_t at = 0; at < stride; ++at) {
    for (std::size_t i = 0; i < width; ++i) {
      magnitudes[i] = run.magnitudes[i * stride + at];
      words[i] = run.words[run.skipped + i * stride + at];
    }
    line.decide(magnitudes.data(), words.data(), own.data());
    for (std::size_t i = 0; i < width; ++i) kept[i * stride + at] = own[i];
  }
}

}  // namespace

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
    const std::size_t first = unit * at_once, last = std::min(count, first + at_once), n = (last - first) * block;
    RankedLine line(limits);
    Run run;
    std::vector<Keep> kept(n + 8);  // a word an entry, and then a bit
    for (std::size_t done = 0; done < n; done += block) {
      run.load(base, expert, philox, first * block + done, block);
      if (stride == 1) line.decide(run.magnitudes.data(), run.words.data() + run.skipped, kept.data() + done);
      else decide_across(run, width, stride, line, kept.data() + done);
    }
    pack_tile(kept.data(), n, mask, first * block);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
