#include "freemerge/task_vector_statistics.h"

#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Sums are formed in this many lanes whatever the width of a register, so that every instruction set gives the same bits.
constexpr std::size_t LANES = 16;

struct Sums {
  double sum[LANES] = {}, sum_abs[LANES] = {}, sum_squares[LANES] = {};
  Magnitude largest[LANES] = {};  // bits of magnitudes: NaN stays the largest

  void add(const float* values) {
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      const double value = values[lane];
      sum[lane] += value;
      sum_abs[lane] += value < 0 ? -value : value;
      sum_squares[lane] += value * value;
      Magnitude bits;
      std::memcpy(&bits, values + lane, 4);
      largest[lane] = std::max(largest[lane], bits & 0x7fffffff);
    }
  }
};

struct Statistics {
  double sum, sum_abs, sum_squares;
  Magnitude largest;
};

static double total(const double* lanes) {
  double sum = lanes[0];
  for (std::size_t lane = 1; lane < LANES; ++lane) sum += lanes[lane];
  return sum;
}

static Statistics measure(const Source& base, const Source& expert, std::size_t start, std::size_t end) {
  alignas(64) float tile[TILE];
  Sums sums;
  for (; start < end; start += TILE) {
    const std::size_t n = std::min(TILE, end - start), padded = (n + LANES - 1) / LANES * LANES;
    task_vector_tile(base, expert, start, n, tile);
    std::fill(tile + n, tile + padded, 0.0f);
    for (std::size_t i = 0; i < padded; i += LANES) sums.add(tile + i);
  }
  return {total(sums.sum), total(sums.sum_abs), total(sums.sum_squares), *std::max_element(sums.largest, sums.largest + LANES)};
}

void task_vector_statistics(const Source& base, const Source& expert, std::size_t n, double* result) {
  std::vector<Statistics> chunks((n + CHUNK - 1) / CHUNK);
  parallel_for(chunks.size(), [&](std::size_t chunk) {
    chunks[chunk] = measure(base, expert, chunk * CHUNK, std::min(n, (chunk + 1) * CHUNK));
  });
  Magnitude largest = 0;
  std::fill_n(result, 3, 0.0);
  for (const Statistics& chunk : chunks) {
    result[0] += chunk.sum;
    result[1] += chunk.sum_abs;
    result[2] += chunk.sum_squares;
    largest = std::max(largest, chunk.largest);
  }
  result[3] = value_of(largest);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
