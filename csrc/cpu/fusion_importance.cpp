#include "freemerge/fusion_importance.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

constexpr double FLOOR = 1e-8;

// exp(x - largest) of a row; answers their sum
double powers(const Source& source, std::size_t start, std::size_t width, std::vector<double>& row) {
  alignas(64) float tile[TILE];
  for (std::size_t done = 0; done < width; done += TILE) {
    const std::size_t n = std::min(TILE, width - done);
    load_tile(source.at(start + done), source.dtype, n, tile);
    std::copy_n(tile, n, row.begin() + static_cast<std::ptrdiff_t>(done));
  }
  const double largest = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (double& value : row) sum += value = std::exp(value - largest);
  return sum;
}

double divergence(const Source& base, const Source& expert, std::size_t start, std::size_t width, std::vector<double>& after,
                  std::vector<double>& before) {
  const double after_sum = powers(expert, start, width, after), before_sum = powers(base, start, width, before);
  double sum = 0;
  for (std::size_t i = 0; i < width; ++i) {
    const double p = after[i] / after_sum + FLOOR, q = before[i] / before_sum + FLOOR;
    sum += p * std::log(p / q);
  }
  return sum < 0 ? 0 : sum;
}

}  // namespace

void fusion_importance(const Source& base, const Source& expert, std::size_t rows, std::size_t width, float* out) {
  const std::size_t rows_at_once = std::max<std::size_t>(1, CHUNK / std::max<std::size_t>(1, width));
  if (width == 0) return;
  parallel_for((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t block) {
    std::vector<double> after(width), before(width);
    for (std::size_t row = block * rows_at_once; row < std::min(rows, (block + 1) * rows_at_once); ++row) {
      const auto factor = static_cast<float>(divergence(base, expert, row * width, width, after, before));
      for (std::size_t start = row * width; start < (row + 1) * width; start += TILE) {
        const std::size_t n = std::min(TILE, (row + 1) * width - start);
        task_vector_tile(base, expert, start, n, out + start);
        for (std::size_t i = start; i < start + n; ++i) out[i] = value_of(magnitude_of(out[i])) * factor;
      }
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
