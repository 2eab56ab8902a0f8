#include "freemerge/count_magnitudes.h"

#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

static MagnitudeCounts count(const Source& base, const Source& expert, std::size_t start, std::size_t end, Magnitude value) {
  alignas(64) float tile[TILE];
  MagnitudeCounts counts{0, 0};
  for (; start < end; start += TILE) {
    const std::size_t n = std::min(TILE, end - start);
    task_vector_tile(base, expert, start, n, tile);
    Magnitude greater = 0, equal = 0;  // as wide as what is compared: a register holds as many of either
    for (std::size_t i = 0; i < n; ++i) {
      const Magnitude magnitude = magnitude_of(tile[i]);
      greater -= -(magnitude > value);
      equal -= -(magnitude == value);
    }
    counts.greater += static_cast<std::size_t>(greater);
    counts.equal += static_cast<std::size_t>(equal);
  }
  return counts;
}

MagnitudeCounts count_magnitudes(const Source& base, const Source& expert, std::size_t n, float value) {
  std::vector<MagnitudeCounts> chunks((n + CHUNK - 1) / CHUNK);
  parallel_for(chunks.size(), [&](std::size_t chunk) {
    chunks[chunk] = count(base, expert, chunk * CHUNK, std::min(n, (chunk + 1) * CHUNK), magnitude_of(value));
  });
  MagnitudeCounts counts{0, 0};
  for (const MagnitudeCounts& chunk : chunks) {
    counts.greater += chunk.greater;
    counts.equal += chunk.equal;
  }
  return counts;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
