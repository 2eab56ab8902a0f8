#include "freemerge/all_finite.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// An exponent of all ones is infinity or NaN; the largest exponent of a tile tells, without a branch an element.
static bool finite_tile(const float* tile, std::size_t n) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, tile + i, 4);
    largest = std::max(largest, bits & 0x7f800000u);
  }
  return largest != 0x7f800000u;
}

static bool finite_doubles(const Source& array, std::size_t start, std::size_t n) {
  alignas(64) double tile[TILE];
  load_tile(array.at(start), array.dtype, n, tile);
  return std::all_of(tile, tile + n, [](double value) { return std::isfinite(value); });
}

static bool finite_run(const Source& array, std::size_t start, std::size_t n) {
  if (array.dtype == DType::f64) return finite_doubles(array, start, n);  // as a float a large double would be infinite
  alignas(64) float tile[TILE];
  load_tile(array.at(start), array.dtype, n, tile);
  return finite_tile(tile, n);
}

bool all_finite(const Source& array, std::size_t n) {
  std::atomic<bool> finite{true};
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end && finite.load(std::memory_order_relaxed); start += TILE)
      if (!finite_run(array, start, std::min(TILE, end - start))) finite = false;
  });
  return finite;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
