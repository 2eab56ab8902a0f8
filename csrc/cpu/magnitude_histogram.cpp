#include <memory>
#include <mutex>
#include <utility>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// A magnitude has 31 bits: a first sweep counts the upper 15 (exponent and 7 bits of the mantissa), a second one the lower 16
// of the entries in the bucket that holds the rank.
constexpr std::size_t BUCKETS = 65536;

// Neighbours often fall into one bucket (a fine-tuned bfloat16 weight mostly changes by 0 or 1 ulp), and a counter cannot be
// incremented twice within its latency: so each bucket has WAYS counters, used in turn.
struct Histogram {
  static constexpr std::size_t WAYS = 4;
  std::vector<std::uint32_t> counts = std::vector<std::uint32_t>(BUCKETS * WAYS);

  void count_upper(const float* tile, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) ++counts[static_cast<std::size_t>(magnitude_of(tile[i]) >> 16) * WAYS + i % WAYS];
  }

  void count_lower(const float* tile, std::size_t n, Magnitude bucket) {
    std::size_t i = 0;
    for (; i + GROUP <= n; i += GROUP)
      if (any_in(tile + i, bucket)) count_group(tile + i, GROUP, bucket);
    count_group(tile + i, n - i, bucket);
  }

 private:
  static bool any_in(const float* values, Magnitude bucket) {
    Magnitude hits = 0;
    for (std::size_t i = 0; i < GROUP; ++i) hits |= -(magnitude_of(values[i]) >> 16 == bucket);
    return hits != 0;
  }

  void count_group(const float* values, std::size_t n, Magnitude bucket) {
    for (std::size_t i = 0; i < n; ++i) {
      const Magnitude magnitude = magnitude_of(values[i]);
      if (magnitude >> 16 == bucket) ++counts[static_cast<std::size_t>(magnitude & 0xffff) * WAYS + i % WAYS];
    }
  }
};

// One histogram for each thread at work, whichever chunks it takes: counts add up to the same.
class Histograms {
 public:
  Histogram& take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      all_.push_back(std::make_unique<Histogram>());
      return *all_.back();
    }
    Histogram& histogram = *free_.back();
    free_.pop_back();
    return histogram;
  }

  void give_back(Histogram& histogram) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(&histogram);
  }

  // The bucket that holds the rank-th largest entry, and its rank in there.
  std::pair<Magnitude, std::size_t> locate(std::size_t rank) const {
    for (std::size_t bucket = BUCKETS; bucket-- > 0;) {
      std::size_t count = 0;
      for (const auto& histogram : all_)
        for (std::size_t way = 0; way < Histogram::WAYS; ++way) count += histogram->counts[bucket * Histogram::WAYS + way];
      if (rank <= count) return {static_cast<Magnitude>(bucket), rank};
      rank -= count;
    }
    return {0, rank};
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Histogram>> all_;
  std::vector<Histogram*> free_;
};

// Call visit(tile, n, histogram) for every tile of the task vectors of all tensors.
template <class Visit>
static void sweep(const std::vector<Pair>& tensors, Histograms& histograms, const Visit& visit) {
  std::vector<std::size_t> first_chunk{0};
  for (const Pair& tensor : tensors) first_chunk.push_back(first_chunk.back() + (tensor.n + CHUNK - 1) / CHUNK);
  parallel_for(first_chunk.back(), [&](std::size_t chunk) {
    const std::size_t which = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
    const Pair& tensor = tensors[which];
    Histogram& histogram = histograms.take();
    alignas(64) float tile[TILE];
    std::size_t start = (chunk - first_chunk[which]) * CHUNK;
    for (const std::size_t end = std::min(tensor.n, start + CHUNK); start < end; start += TILE) {
      const std::size_t n = std::min(TILE, end - start);
      task_vector_tile(tensor.base, tensor.expert, start, n, tile);
      visit(tile, n, histogram);
    }
    histograms.give_back(histogram);
  });
}

Cut threshold_by_histograms(const std::vector<Pair>& tensors, std::size_t rank) {
  Histograms upper, lower;
  sweep(tensors, upper, [](const float* tile, std::size_t n, Histogram& histogram) { histogram.count_upper(tile, n); });
  const auto [bucket, rank_in_bucket] = upper.locate(rank);
  sweep(tensors, lower, [bucket = bucket](const float* tile, std::size_t n, Histogram& histogram) {
    histogram.count_lower(tile, n, bucket);
  });
  const auto [low_bits, ties] = lower.locate(rank_in_bucket);
  return {value_of(bucket << 16 | low_bits), ties};
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
