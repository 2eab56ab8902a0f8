#include "freemerge/magnitude_mask.h"

#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

BitCut cut_of(const Cuts& cuts, std::size_t row) {
  return {magnitude_of(cuts.values[row]), static_cast<std::size_t>(cuts.ties[row])};
}

std::size_t count_equal(const float* tile, std::size_t n, Magnitude value) {
  Magnitude count = 0;
  for (std::size_t i = 0; i < n; ++i) count -= -(magnitude_of(tile[i]) == value);
  return static_cast<std::size_t>(count);
}

// Takes the ties of a tile out of those left. Answers whether the same magnitudes belong to the cut everywhere in the tile, and
// then the smallest of them.
bool settle(const float* tile, std::size_t n, BitCut& cut, Magnitude& floor) {
  floor = cut.value + (cut.ties == 0);
  if (cut.ties == 0) return true;
  const std::size_t equal = count_equal(tile, n, cut.value);
  if (equal > cut.ties) return false;
  cut.ties -= equal;
  return true;
}

bool belongs(BitCut& cut, Magnitude magnitude) {
  if (magnitude != cut.value) return magnitude > cut.value;
  if (cut.ties == 0) return false;
  --cut.ties;
  return true;
}

// keep[i] = the i-th entry lies between the cuts, which are left with the ties of the entries to come
void keep_tile(const float* tile, std::size_t n, BitCut& lower, BitCut& upper, Keep* keep) {
  const BitCut before = lower;
  Magnitude floor, ceiling;
  if (settle(tile, n, lower, floor)) {
    if (settle(tile, n, upper, ceiling)) {
      for (std::size_t i = 0; i < n; ++i) {
        const Magnitude magnitude = magnitude_of(tile[i]);
        keep[i] = -((magnitude >= floor) & (magnitude < ceiling));
      }
      return;
    }
    lower = before;
  }
  for (std::size_t i = 0; i < n; ++i) {
    const Magnitude magnitude = magnitude_of(tile[i]);
    const bool above = belongs(upper, magnitude);
    keep[i] = -static_cast<Keep>(belongs(lower, magnitude) & !above);
  }
}

// The ties a chunk may use, given how many entries the chunks before it have.
void allot(const std::vector<std::size_t>& equal, std::size_t ties, std::vector<std::size_t>& shares) {
  for (std::size_t chunk = 0; chunk < equal.size(); ++chunk) {
    shares[chunk] = ties;
    ties -= std::min(ties, equal[chunk]);
  }
}

void mask_all(const Source& base, const Source& expert, std::size_t n, const BitCut& lower, const BitCut& upper, std::uint8_t* mask) {
  const std::size_t chunks = (n + CHUNK - 1) / CHUNK;
  const auto each_tile = [&](std::size_t chunk, const auto& visit) {
    alignas(64) float tile[TILE];
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE) {
      const std::size_t count = std::min(TILE, end - start);
      task_vector_tile(base, expert, start, count, tile);
      visit(tile, count, start);
    }
  };
  std::vector<std::size_t> lower_ties(chunks), upper_ties(chunks);
  if (lower.ties != 0 || upper.ties != 0) {
    std::vector<std::size_t> lower_equal(chunks), upper_equal(chunks);
    parallel_for(chunks, [&](std::size_t chunk) {
      each_tile(chunk, [&](const float* tile, std::size_t count, std::size_t) {
        if (lower.ties != 0) lower_equal[chunk] += count_equal(tile, count, lower.value);
        if (upper.ties != 0) upper_equal[chunk] += count_equal(tile, count, upper.value);
      });
    });
    allot(lower_equal, lower.ties, lower_ties);
    allot(upper_equal, upper.ties, upper_ties);
  }
  parallel_for(chunks, [&](std::size_t chunk) {
    BitCut low{lower.value, lower_ties[chunk]}, high{upper.value, upper_ties[chunk]};
    each_tile(chunk, [&](const float* tile, std::size_t count, std::size_t start) {
      alignas(64) Keep keep[KEEP_TILE];
      keep_tile(tile, count, low, high, keep);
      pack_tile(keep, count, mask, start);
    });
  });
}

// Eight rows have whole bytes of the mask, whatever their width.
void mask_rows(const Source& base, const Source& expert, std::size_t rows, std::size_t width, const Cuts& lower, const Cuts& upper,
               std::uint8_t* mask) {
  const std::size_t rows_at_once = std::max<std::size_t>(1, CHUNK / 8 / std::max<std::size_t>(1, width)) * 8;
  parallel_for((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t block) {
    alignas(64) float tile[TILE];
    alignas(64) Keep keep[KEEP_TILE];
    const std::size_t first = block * rows_at_once, last = std::min(rows, first + rows_at_once);
    std::fill(mask + first * width / 8, mask + (last * width + 7) / 8, std::uint8_t{0});
    for (std::size_t row = first; row < last; ++row) {
      BitCut low = cut_of(lower, row), high = cut_of(upper, row);
      for (std::size_t start = row * width; start < (row + 1) * width; start += TILE) {
        const std::size_t n = std::min(TILE, (row + 1) * width - start);
        task_vector_tile(base, expert, start, n, tile);
        keep_tile(tile, n, low, high, keep);
        for (std::size_t i = start; i < start + n; ++i) mask[i / 8] |= static_cast<std::uint8_t>(keep[i - start] & 1 << i % 8);
      }
    }
  });
}

}  // namespace

void magnitude_mask(const Source& base, const Source& expert, std::size_t rows, std::size_t width, const Cuts& lower,
                    const Cuts& upper, bool of_each_row, std::uint8_t* mask) {
  if (of_each_row) mask_rows(base, expert, rows, width, lower, upper, mask);
  else mask_all(base, expert, rows * width, cut_of(lower, 0), cut_of(upper, 0), mask);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
