#include "freemerge/mask_statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Sums are formed in this many lanes whatever the width of a register, so that every instruction set gives the same bits.
constexpr std::size_t LANES = 16;

using MaskSums = std::array<double, 4>;

static MaskSums measure(const Source& base, const Source& expert, const std::uint8_t* mask, std::size_t start, std::size_t end) {
  alignas(64) float tile[TILE];
  alignas(64) Keep keep[KEEP_TILE];
  double sum[LANES] = {}, kept[LANES] = {}, squares[LANES] = {};
  Keep count[LANES] = {};
  for (; start < end; start += TILE) {
    const std::size_t n = std::min(TILE, end - start), padded = (n + LANES - 1) / LANES * LANES;
    task_vector_tile(base, expert, start, n, tile);
    unpack_tile(mask, start, n, keep);
    std::fill(tile + n, tile + padded, 0.0f);
    std::fill(keep + n, keep + padded, Keep{0});
    for (std::size_t i = 0; i < padded; i += LANES) {
      for (std::size_t lane = 0; lane < LANES; ++lane) {
        const double value = std::fabs(tile[i + lane]), kept_value = std::fabs(masked(tile[i + lane], keep[i + lane]));
        sum[lane] += value;
        kept[lane] += kept_value;
        squares[lane] += kept_value * kept_value;
        count[lane] -= keep[i + lane];
      }
    }
  }
  MaskSums total{};
  for (std::size_t lane = 0; lane < LANES; ++lane) {
    total[0] += count[lane];
    total[1] += sum[lane];
    total[2] += kept[lane];
    total[3] += squares[lane];
  }
  return total;
}

void mask_statistics(const Source& base, const Source& expert, const std::uint8_t* mask, std::size_t n, double* result) {
  std::vector<MaskSums> chunks((n + CHUNK - 1) / CHUNK);
  parallel_for(chunks.size(), [&](std::size_t chunk) {
    chunks[chunk] = measure(base, expert, mask, chunk * CHUNK, std::min(n, (chunk + 1) * CHUNK));
  });
  std::fill_n(result, 4, 0.0);
  for (const MaskSums& chunk : chunks)
    for (std::size_t i = 0; i < 4; ++i) result[i] += chunk[i];
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
