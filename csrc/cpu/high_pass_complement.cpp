#include <algorithm>
#include <cmath>
#include <numeric>

#include "freemerge/high_pass_forms.h"
#include "freemerge/scratch.h"
#include "freemerge/simd.h"
#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

constexpr std::size_t ROWS = 24;                    // rows a thread takes at once
constexpr std::size_t KERNEL_ROWS = WIDTH * 3 / 4;  // rows whose sums stay in registers: 12 accumulators
constexpr std::size_t PART = 128;                   // points of a row summed before the sum is added to the total; their tables fit the cache
constexpr std::size_t VECTORS = LANES / WIDTH;

std::size_t rounded_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// Cosines and sines of 2 pi v x / length for the selected v and 0 <= x <= length/2: a row is folded to its even and odd part there.
struct Tables {
  Tables(const Columns& columns, std::size_t length)
      : half(length / 2 + 1), width(rounded_up(half, LANES)), blocks(columns.blocks()), count(columns.selected().size()),
        memory((4 * blocks * LANES * width + 1) * sizeof(float)), across(memory.floats()), along(across + 2 * blocks * LANES * width) {
    std::vector<double> cosine(length), sine(length);
    for (std::size_t i = 0; i < length && count > 0; ++i) {
      cosine[i] = std::cos(2 * M_PI * i / length);
      sine[i] = std::sin(2 * M_PI * i / length);
    }
    std::fill_n(across, 4 * blocks * LANES * width, 0.0f);
    for (std::size_t c = 0; c < count; ++c) {
      const std::size_t v = columns.selected()[c], block = c / LANES, lane = c % LANES;
      const double twice = v == 0 || 2 * v == length ? 1 : 2;   // -v is not listed: it adds the same again
      for (std::size_t x = 0, j = 0; x < half; ++x, j = (j + v) % length) {
        analysis(block, 0)[x * LANES + lane] = static_cast<float>(cosine[j]);
        analysis(block, 1)[x * LANES + lane] = static_cast<float>(-sine[j]);
        synthesis(c, 0)[x] = static_cast<float>(twice * cosine[j]);
        synthesis(c, 1)[x] = static_cast<float>(-twice * sine[j]);
      }
    }
  }

  float* analysis(std::size_t block, int part) const { return across + (2 * block + part) * width * LANES; }   // [x][16 columns]
  float* synthesis(std::size_t column, int part) const { return along + (2 * column + part) * width; }         // [x]

  std::size_t half, width, blocks, count;
  Scratch memory;
  float *across, *along;
};

class Complement {
 public:
  Complement(const HighPass& plan, const Columns& columns, const Input& input, const Output& output, float* workspace)
      : plan_(plan), columns_(columns), input_(input), output_(output), spectrum_(workspace), tables_(columns, plan.columns) {}

  double run() {
    const std::size_t units = groups_of(plan_.rows, ROWS);
    if (!columns_.selected().empty()) {
      parallel_for(units, [this](std::size_t unit) { analyse(unit * ROWS, std::min(ROWS, plan_.rows - unit * ROWS)); });
      columns_.filter(spectrum_, 1.0f, static_cast<float>(1.0 / (static_cast<double>(plan_.rows) * plan_.columns)));
    }
    std::vector<double> parts(units);
    parallel_for(units, [&](std::size_t unit) { parts[unit] = synthesise(unit * ROWS, std::min(ROWS, plan_.rows - unit * ROWS)); });
    return std::accumulate(parts.begin(), parts.end(), 0.0);
  }

 private:
  float* point(std::size_t block, std::size_t row) const { return spectrum_ + block * columns_.block_floats() + row * POINT; }

  void load_row(std::size_t row, float* x) const {
    const std::size_t n = plan_.columns, start = row * n;
    for (std::size_t i = 0; i < n; i += TILE) input_.load(start + i, std::min(TILE, n - i), x + i);
  }

  // ---- rows to the coefficients of the selected columns ----

  void analyse(std::size_t first, std::size_t rows) const {
    const std::size_t n = plan_.columns, width = tables_.width;
    const Scratch scratch((n + 2 * ROWS * width) * sizeof(float));
    float *x = scratch.floats(), *folded[2] = {x + n, x + n + ROWS * width};
    std::fill_n(folded[0], 2 * ROWS * width, 0.0f);
    for (std::size_t row = 0; row < rows; ++row) {
      load_row(first + row, x);
      fold(x, folded[0] + row * width, folded[1] + row * width);
    }
    for (std::size_t block = 0; block < tables_.blocks; ++block) {
      alignas(64) float sums[2][ROWS][LANES] = {};
      for (std::size_t start = 0; start < tables_.half; start += PART)
        for (int part = 0; part < 2; ++part)
          for (std::size_t row = 0; row < rows; row += KERNEL_ROWS)
            add_products(folded[part] + row * width + start, width, tables_.analysis(block, part) + start * LANES,
                         std::min(PART, tables_.half - start), sums[part][row]);
      for (std::size_t row = 0; row < rows; ++row)
        for (int part = 0; part < 2; ++part) std::copy_n(sums[part][row], LANES, point(block, first + row) + part * LANES);
    }
  }

  // even[i] = x[i] + x[n - i], odd[i] = x[i] - x[n - i]; points that are their own mirror image go to even once
  void fold(const float* x, float* even, float* odd) const {
    const std::size_t n = plan_.columns, pairs = (n - 1) / 2;
    even[0] = x[0];
    for (std::size_t i = 1; i <= pairs; ++i) {
      even[i] = x[i] + x[n - i];
      odd[i] = x[i] - x[n - i];
    }
    if (n % 2 == 0) even[n / 2] = x[n / 2];
  }

  // sums[row][lane] += sum_i folded[row][i] * table[i][lane]
  static void add_products(const float* folded, std::size_t stride, const float* table, std::size_t n, float* sums) {
    Vec totals[KERNEL_ROWS][VECTORS] = {};
    for (std::size_t i = 0; i < n; ++i) {
      Vec roots[VECTORS];
      for (std::size_t k = 0; k < VECTORS; ++k) roots[k] = load(table + i * LANES + k * WIDTH);
#pragma GCC unroll 12
      for (std::size_t row = 0; row < KERNEL_ROWS; ++row) {
        const Vec value = splat(folded[row * stride + i]);
        for (std::size_t k = 0; k < VECTORS; ++k) totals[row][k] = fma(value, roots[k], totals[row][k]);
      }
    }
    for (std::size_t row = 0; row < KERNEL_ROWS; ++row)
      for (std::size_t k = 0; k < VECTORS; ++k) {
        float* sum = sums + row * LANES + k * WIDTH;
        store(sum, load(sum) + totals[row][k]);
      }
  }

  // ---- coefficients back to rows ----

  double synthesise(std::size_t first, std::size_t rows) const {
    const std::size_t n = plan_.columns;
    const Scratch scratch(ROWS * n * sizeof(float));
    float* x = scratch.floats();
    for (std::size_t row = 0; row < rows; ++row) load_row(first + row, x + row * n);
    std::vector<float> coefficients(2 * tables_.count * ROWS);   // [part][column][row]
    for (std::size_t c = 0; c < tables_.count; ++c)
      for (int part = 0; part < 2; ++part)
        for (std::size_t row = 0; row < rows; ++row)
          coefficients[(part * tables_.count + c) * ROWS + row] = point(c / LANES, first + row)[part * LANES + c % LANES];
    for (std::size_t start = 0; start < tables_.half && tables_.count > 0; start += LANES)
      for (std::size_t row = 0; row < rows; row += KERNEL_ROWS) {
        alignas(64) float parts[2][KERNEL_ROWS][LANES];
        for (int part = 0; part < 2; ++part) combine(coefficients.data() + part * tables_.count * ROWS + row, part, start, parts[part][0]);
        for (std::size_t k = row; k < std::min(rows, row + KERNEL_ROWS); ++k) unfold(x + k * n, start, parts[0][k - row], parts[1][k - row]);
      }
    double magnitude = 0;
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t i = 0; i < n; i += TILE)
        magnitude += output_.take((first + row) * n + i, std::min(TILE, n - i), x + row * n + i, 1.0f);
    return magnitude;
  }

  // result[row][i] = sum_c coefficients[c][row] * table[c][start + i]
  void combine(const float* coefficients, int part, std::size_t start, float* result) const {
    Vec totals[KERNEL_ROWS][VECTORS] = {};
    for (std::size_t c = 0; c < tables_.count; ++c) {
      Vec roots[VECTORS];
      for (std::size_t k = 0; k < VECTORS; ++k) roots[k] = load(tables_.synthesis(c, part) + start + k * WIDTH);
#pragma GCC unroll 12
      for (std::size_t row = 0; row < KERNEL_ROWS; ++row) {
        const Vec value = splat(coefficients[c * ROWS + row]);
        for (std::size_t k = 0; k < VECTORS; ++k) totals[row][k] = fma(value, roots[k], totals[row][k]);
      }
    }
    for (std::size_t row = 0; row < KERNEL_ROWS; ++row)
      for (std::size_t k = 0; k < VECTORS; ++k) store(result + row * LANES + k * WIDTH, totals[row][k]);
  }

  // The even part is the same at i and n - i, the odd part changes sign.
  void unfold(float* x, std::size_t start, const float* even, const float* odd) const {
    const std::size_t n = plan_.columns, end = std::min(LANES, tables_.half - start);
    for (std::size_t i = 0; i < end; ++i) x[start + i] += even[i] + odd[i];
    const std::size_t from = start == 0 ? 1 : 0, to = std::min(end, (n - 1) / 2 + 1 > start ? (n - 1) / 2 + 1 - start : 0);
    float* mirrored = x + n - start;
    for (std::size_t i = from; i < to; ++i) *(mirrored - i) += even[i] - odd[i];
  }

  const HighPass& plan_;
  const Columns& columns_;
  const Input& input_;
  const Output& output_;
  float* spectrum_;
  const Tables tables_;
};

}  // namespace

double filter_by_complement(const HighPass& plan, const Columns& columns, const Input& input, const Output& output, float* workspace) {
  return Complement(plan, columns, input, output, workspace).run();
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
