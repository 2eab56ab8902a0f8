#include "freemerge/dot_products.h"

#include <algorithm>
#include <vector>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// Sums are formed in this many lanes whatever the width of a register, so that every instruction set gives the same bits.
constexpr std::size_t LANES = 16;

struct Vectors {
  const Source& base;
  const Source* arrays;
  std::size_t T;

  std::size_t pairs() const { return T * (T + 1) / 2; }

  // tiles[t] = entries start ... start + n of vector t
  void load(std::size_t start, std::size_t n, float (*tiles)[TILE]) const {
    for (std::size_t t = 0; t < T; ++t) task_vector_tile(base, arrays[t], start, n, tiles[t]);
  }

  // From the sums of pairs s <= t to a symmetric matrix.
  void unfold(const double* sums, double* matrix) const {
    for (std::size_t s = 0; s < T; ++s)
      for (std::size_t t = s; t < T; ++t) matrix[s * T + t] = matrix[t * T + s] = *sums++;
  }
};

struct Tiles {
  alignas(64) float values[1][TILE];
};

double dot(const float* left, const float* right, std::size_t padded) {
  double lanes[LANES] = {};
  for (std::size_t i = 0; i < padded; i += LANES)
    for (std::size_t lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(left[i + lane]) * right[i + lane];
  double sum = lanes[0];
  for (std::size_t lane = 1; lane < LANES; ++lane) sum += lanes[lane];
  return sum;
}

// sums[pair] += over the entries start ... end
void add_products(const Vectors& vectors, std::size_t start, std::size_t end, std::vector<Tiles>& tiles, double* sums) {
  auto* values = tiles.data()->values;
  for (; start < end; start += TILE) {
    const std::size_t n = std::min(TILE, end - start), padded = (n + LANES - 1) / LANES * LANES;
    vectors.load(start, n, values);
    for (std::size_t t = 0; t < vectors.T; ++t) std::fill(values[t] + n, values[t] + padded, 0.0f);
    std::size_t pair = 0;
    for (std::size_t s = 0; s < vectors.T; ++s)
      for (std::size_t t = s; t < vectors.T; ++t) sums[pair++] += dot(values[s], values[t], padded);
  }
}

// One line: chunks in parallel, added in their order.
void one_line(const Vectors& vectors, std::size_t n, double* result) {
  const std::size_t pairs = vectors.pairs(), chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<double> partial(chunks * pairs), sums(pairs);
  parallel_for(chunks, [&](std::size_t chunk) {
    std::vector<Tiles> tiles(vectors.T);
    add_products(vectors, chunk * CHUNK, std::min(n, (chunk + 1) * CHUNK), tiles, partial.data() + chunk * pairs);
  });
  for (std::size_t i = 0; i < partial.size(); ++i) sums[i % pairs] += partial[i];
  vectors.unfold(sums.data(), result);
}

void each_row(const Vectors& vectors, std::size_t rows, std::size_t width, double* result) {
  const std::size_t rows_at_once = std::max<std::size_t>(1, CHUNK / std::max<std::size_t>(1, width));
  parallel_for((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t block) {
    std::vector<Tiles> tiles(vectors.T);
    std::vector<double> sums(vectors.pairs());
    for (std::size_t row = block * rows_at_once; row < std::min(rows, (block + 1) * rows_at_once); ++row) {
      std::fill(sums.begin(), sums.end(), 0.0);
      add_products(vectors, row * width, (row + 1) * width, tiles, sums.data());
      vectors.unfold(sums.data(), result + row * vectors.T * vectors.T);
    }
  });
}

// A stripe of columns at a time, one row after another.
void each_column(const Vectors& vectors, std::size_t rows, std::size_t width, double* result) {
  constexpr std::size_t STRIPE = 128;
  const std::size_t pairs = vectors.pairs();
  parallel_for((width + STRIPE - 1) / STRIPE, [&](std::size_t stripe) {
    std::vector<Tiles> tiles(vectors.T);
    auto* values = tiles.data()->values;
    const std::size_t first = stripe * STRIPE, n = std::min(STRIPE, width - first);
    std::vector<double> sums(pairs * n), of_column(pairs);
    for (std::size_t row = 0; row < rows; ++row) {
      vectors.load(row * width + first, n, values);
      double* sum = sums.data();
      for (std::size_t s = 0; s < vectors.T; ++s)
        for (std::size_t t = s; t < vectors.T; ++t, sum += n)
          for (std::size_t i = 0; i < n; ++i) sum[i] += static_cast<double>(values[s][i]) * values[t][i];
    }
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t pair = 0; pair < pairs; ++pair) of_column[pair] = sums[pair * n + i];
      vectors.unfold(of_column.data(), result + (first + i) * vectors.T * vectors.T);
    }
  });
}

}  // namespace

void dot_products(const Source& base, const Source* arrays, int T, std::size_t rows, std::size_t width, bool by_column, double* result) {
  const Vectors vectors{base, arrays, static_cast<std::size_t>(T)};
  if (by_column) each_column(vectors, rows, width, result);
  else if (rows == 1) one_line(vectors, width, result);
  else each_row(vectors, rows, width, result);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
