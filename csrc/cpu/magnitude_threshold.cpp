#include "freemerge/magnitude_threshold.h"

#include <atomic>
#include <cmath>
#include <functional>
#include <optional>

#include "freemerge/magnitude.h"
#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// The upper bits of the magnitudes in memory narrow the search to one bucket; what falls into it is copied and partly sorted.
static std::size_t gather_bucket(const Magnitude* magnitudes, std::size_t n, std::size_t& rank, std::vector<Magnitude>& bucket) {
  constexpr int SHIFT = 20;
  std::uint32_t counts[2][(INFINITE >> SHIFT) + 1] = {};
  for (std::size_t i = 0; i < n; ++i) ++counts[i % 2][magnitudes[i] >> SHIFT];
  Magnitude found = INFINITE >> SHIFT;
  for (; rank > counts[0][found] + counts[1][found]; --found) rank -= counts[0][found] + counts[1][found];
  bucket.resize(counts[0][found] + counts[1][found] + 1);  // and one that is written before it is known not to belong
  std::size_t kept = 0;
  for (std::size_t i = 0; i < n; ++i) {
    bucket[kept] = magnitudes[i];
    kept += magnitudes[i] >> SHIFT == found;
  }
  return kept;
}

BitCut find_cut(const Magnitude* magnitudes, std::size_t n, std::size_t rank) {
  if (rank == 0) return {INFINITE, 0};
  thread_local std::vector<Magnitude> bucket;
  n = gather_bucket(magnitudes, n, rank, bucket);
  const auto nth = bucket.begin() + static_cast<std::ptrdiff_t>(rank - 1);
  std::nth_element(bucket.begin(), nth, bucket.begin() + static_cast<std::ptrdiff_t>(n), std::greater<Magnitude>());
  const Magnitude value = *nth;
  return {value, rank - static_cast<std::size_t>(std::count_if(bucket.begin(), nth, [value](Magnitude m) { return m > value; }))};
}

// Task vectors of so few elements are held in memory rather than swept over: histograms would take longer to clear.
constexpr std::size_t SMALL = 262144;

static Cut small_threshold(const std::vector<Pair>& tensors, std::size_t total, std::size_t rank) {
  std::vector<Magnitude> magnitudes(total);
  auto next = magnitudes.begin();
  alignas(64) float tile[TILE];
  for (const Pair& tensor : tensors) {
    for (std::size_t start = 0; start < tensor.n; start += TILE) {
      const std::size_t n = std::min(TILE, tensor.n - start);
      task_vector_tile(tensor.base, tensor.expert, start, n, tile);
      next = std::transform(tile, tile + n, next, magnitude_of);
    }
  }
  const BitCut cut = find_cut(magnitudes.data(), total, rank);
  return {value_of(cut.value), cut.ties};
}

// Two magnitudes between which the cut lies in all probability: all that is left to know is how many entries are above, and the
// few that are between.
struct Bracket {
  Magnitude low, high;
};

struct Position {
  std::size_t tensor, start;
};

static std::vector<std::size_t> first_elements(const std::vector<Pair>& tensors) {
  std::vector<std::size_t> first{0};
  for (const Pair& tensor : tensors) first.push_back(first.back() + tensor.n);
  return first;
}

// From runs of entries spread evenly; the cut is four standard deviations away from either side.
static Bracket guess(const std::vector<Pair>& tensors, std::size_t total, std::size_t rank) {
  constexpr std::size_t RUN = 128, LEAST = 32768, MOST = 262144;
  const std::size_t runs = std::clamp(total / 256, LEAST, MOST) / RUN;
  const std::vector<std::size_t> first = first_elements(tensors);
  std::vector<Magnitude> sample;
  alignas(64) float tile[TILE];
  for (std::size_t run = 0; run < runs; ++run) {
    const std::size_t at = total / runs * run, which = std::upper_bound(first.begin(), first.end(), at) - first.begin() - 1;
    const std::size_t n = std::min(RUN, first[which + 1] - at);
    task_vector_tile(tensors[which].base, tensors[which].expert, at - first[which], n, tile);
    std::transform(tile, tile + n, std::back_inserter(sample), magnitude_of);
  }
  const double size = static_cast<double>(sample.size()), share = static_cast<double>(rank) / static_cast<double>(total);
  const double middle = size * share, margin = 4 * std::sqrt(size * share * (1 - share)) + 4;
  const auto of_rank = [&](double place) {
    const auto nth = sample.begin() + static_cast<std::ptrdiff_t>(place);
    std::nth_element(sample.begin(), nth, sample.end(), std::greater<Magnitude>());
    return *nth;
  };
  return {middle + margin < size - 1 ? of_rank(middle + margin) : 0, middle - margin > 0 ? of_rank(middle - margin) : INFINITE};
}

// What a chunk has of a bracket.
struct Found {
  std::size_t above = 0, at_high = 0, at_low = 0;
  std::vector<Magnitude> between;

  void add(const float* tile, std::size_t n, const Bracket& bracket) {
    alignas(64) Magnitude magnitudes[TILE];
    alignas(64) Keep inside[KEEP_TILE];
    Magnitude over = 0, high = 0, low = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const Magnitude magnitude = magnitude_of(tile[i]);
      over += magnitude > bracket.high;
      high += magnitude == bracket.high;
      low += magnitude == bracket.low;
      inside[i] = -((magnitude > bracket.low) & (magnitude < bracket.high));
      magnitudes[i] = magnitude;
    }
    above += static_cast<std::size_t>(over);
    at_high += static_cast<std::size_t>(high);
    at_low += static_cast<std::size_t>(low);
    std::uint64_t words[TILE / 64] = {};
    pack_tile(inside, n, reinterpret_cast<std::uint8_t*>(words), 0);
    for (std::size_t w = 0; w < TILE / 64; ++w)
      for (; words[w] != 0; words[w] &= words[w] - 1) between.push_back(magnitudes[64 * w + __builtin_ctzll(words[w])]);
  }
};

// Of the bracket's own entries and those between: the cut, if it is among them.
static std::optional<BitCut> cut_in(const Bracket& bracket, const std::vector<Found>& chunks, std::size_t rank) {
  Found all;
  for (const Found& chunk : chunks) {
    all.above += chunk.above;
    all.at_high += chunk.at_high;
    all.at_low += chunk.at_low;
    all.between.insert(all.between.end(), chunk.between.begin(), chunk.between.end());
  }
  if (rank <= all.above) return std::nullopt;
  rank -= all.above;
  if (rank <= all.at_high) return BitCut{bracket.high, rank};
  rank -= all.at_high;
  if (rank <= all.between.size()) return find_cut(all.between.data(), all.between.size(), rank);
  rank -= all.between.size();
  if (rank <= all.at_low && bracket.low < bracket.high) return BitCut{bracket.low, rank};
  return std::nullopt;
}

static std::optional<BitCut> cut_in(const Bracket& bracket, const std::vector<Pair>& tensors, std::size_t total, std::size_t rank) {
  std::vector<Found> chunks;
  for (const Pair& tensor : tensors) {
    const std::size_t before = chunks.size();
    chunks.resize(before + (tensor.n + CHUNK - 1) / CHUNK);
    std::atomic<std::size_t> between{0};
    parallel_for(chunks.size() - before, [&](std::size_t chunk) {
      alignas(64) float tile[TILE];
      const std::size_t end = std::min(tensor.n, (chunk + 1) * CHUNK);
      for (std::size_t start = chunk * CHUNK; start < end && between < total / 16; start += TILE) {
        const std::size_t n = std::min(TILE, end - start);
        task_vector_tile(tensor.base, tensor.expert, start, n, tile);
        chunks[before + chunk].add(tile, n, bracket);
      }
      between += chunks[before + chunk].between.size();
    });
    if (between >= total / 16) return std::nullopt;  // far more than there should be: they are not held in memory
  }
  return cut_in(bracket, chunks, rank);
}

Cut magnitude_threshold(const std::vector<Pair>& tensors, std::size_t rank) {
  if (rank == 0) return {value_of(INFINITE), 0};
  std::size_t total = 0;
  for (const Pair& tensor : tensors) total += tensor.n;
  if (total <= SMALL) return small_threshold(tensors, total, rank);
  if (const auto cut = cut_in(guess(tensors, total, rank), tensors, total, rank)) return {value_of(cut->value), cut->ties};
  return threshold_by_histograms(tensors, rank);  // the sample was misleading
}

void row_thresholds(const Source& base, const Source& expert, std::size_t rows, std::size_t width, std::size_t rank, float* values,
                    std::int64_t* ties) {
  const std::size_t rows_at_once = std::max<std::size_t>(1, CHUNK / std::max<std::size_t>(1, width));
  parallel_for((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t block) {
    std::vector<Magnitude> magnitudes(width);
    alignas(64) float tile[TILE];
    for (std::size_t row = block * rows_at_once; row < std::min(rows, (block + 1) * rows_at_once); ++row) {
      for (std::size_t column = 0; column < width; column += TILE) {
        const std::size_t n = std::min(TILE, width - column);
        task_vector_tile(base, expert, row * width + column, n, tile);
        for (std::size_t i = 0; i < n; ++i) magnitudes[column + i] = magnitude_of(tile[i]);
      }
      const BitCut cut = find_cut(magnitudes.data(), width, rank);
      values[row] = value_of(cut.value);
      ties[row] = static_cast<std::int64_t>(cut.ties);
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
