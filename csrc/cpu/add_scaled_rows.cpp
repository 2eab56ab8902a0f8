#include "freemerge/add_scaled_rows.h"

#include <algorithm>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

struct Sum {
  const Source& base;
  const Source* arrays;
  const float* weights;
  int T;
  std::size_t rows, width;
  bool by_column;
  const Target& out;

  // Entries column ... column + n of a row.
  void tile(std::size_t row, std::size_t column, std::size_t n) const {
    alignas(64) float base_tile[TILE], vector[TILE], total[TILE];
    const std::size_t start = row * width + column;
    if (base) load_tile(base.at(start), base.dtype, n, base_tile);
    std::fill_n(total, n, 0.0f);
    for (int t = 0; t < T; ++t) {
      if (base) task_vector_tile(base, base_tile, arrays[t], start, n, vector);
      else load_tile(arrays[t].at(start), arrays[t].dtype, n, vector);
      if (by_column) {
        const float* own = weights + t * width + column;
        for (std::size_t i = 0; i < n; ++i) total[i] += own[i] * vector[i];
      } else {
        const float own = weights[t * rows + row];
        for (std::size_t i = 0; i < n; ++i) total[i] += own * vector[i];
      }
    }
    if (base) store_sum_tile(base, base_tile, total, start, n, out);
    else store_tile(total, n, out.dtype, out.at(start));
  }
};

}  // namespace

void add_scaled_rows(const Source& base, const Source* arrays, const float* weights, int T, std::size_t rows, std::size_t width,
                     bool by_column, const Target& out) {
  const Sum sum{base, arrays, weights, T, rows, width, by_column, out};
  const std::size_t n = rows * width;
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end;) {
      const std::size_t row = start / width, column = start % width;
      const std::size_t count = std::min({TILE, width - column, end - start});
      sum.tile(row, column, count);
      start += count;
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
