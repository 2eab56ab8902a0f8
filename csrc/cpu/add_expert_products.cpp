#include "freemerge/add_expert_products.h"

#include <algorithm>
#include <map>
#include <vector>

#include "freemerge/openmp.h"
#include "freemerge/scratch.h"
#include "freemerge/simd.h"
#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// Tokens are the lanes: of a transposed tile of x, an entry of a row takes one column of lanes, which lie together.
constexpr int MOST = 64, MANY = 32;           // lanes of a full tile, and of one of
constexpr std::size_t WIDE = 1024;            // columns or more, of which MOST would leave the second-level cache
constexpr int FEW = WIDTH < 8 ? 8 : WIDTH;    // lanes of what is left over: one register, and whole 8 x 8 blocks
constexpr std::size_t BLOCK = 64;             // rows of an expert between two visits to out
constexpr std::size_t COLUMNS = 128;          // of x, transposed at a time
constexpr std::size_t WORTH_SHARING = 30000;  // multiplications of registers

// Some of the tokens that share their experts.
struct Tokens {
  const std::vector<std::size_t>* index;
  std::size_t first, count;
  const std::vector<std::size_t>* experts;

  std::size_t operator[](std::size_t lane) const { return (*index)[first + lane]; }
};

struct Products {
  const Source& x;
  const SparseSource* experts;
  const float *scales, *weights;
  std::size_t E, tokens_in_group;
  const Target& out;

  std::size_t rows() const { return experts[0].rows; }
  std::size_t width() const { return experts[0].width; }
  float weight(std::size_t token, std::size_t e) const { return weights[token / tokens_in_group * E + e] * scales[e]; }
};

template <int LANES>
struct Lanes {  // LANES numbers in as many registers as it takes
  static constexpr int COUNT = LANES / WIDTH;
  Vec sums[COUNT];

  void clear() { for (auto& sum : sums) sum = splat(0); }
  // product and sum are rounded each, as everywhere: the same bits with every instruction set
  void add(float value, const float* column) {
    const Vec factor = splat(value);
    FREEMERGE_UNROLL(16)
    for (int j = 0; j < COUNT; ++j) sums[j] += factor * load(column + j * WIDTH);
  }
  void add_weighted_to(const float* weights, float* totals) const {
    for (int j = 0; j < COUNT; ++j)
      store(totals + j * WIDTH, load(totals + j * WIDTH) + load(weights + j * WIDTH) * sums[j]);
  }
};

template <>
struct Lanes<1> {
  float sum;

  void clear() { sum = 0; }
  void add(float value, const float* column) { sum += value * *column; }
  void add_weighted_to(const float* weights, float* totals) const { *totals += *weights * sum; }
};

// totals[r - first][lane] += weights[lane] * (row r times the tokens)
template <int LANES, class Column>
void add_rows(const SparseSource& expert, std::size_t first, std::size_t end, const float* tokens, const float* weights,
              float* totals) {
  const auto* columns = static_cast<const Column*>(expert.columns);
  for (std::size_t r = first; r < end; ++r, totals += LANES) {
    const auto begin = expert.offsets[r], stop = expert.offsets[r + 1];
    if (begin == stop) continue;
    Lanes<LANES> sums;
    sums.clear();
    for (auto k = begin; k < stop; ++k) sums.add(expert.values[k], tokens + static_cast<std::size_t>(columns[k]) * LANES);
    sums.add_weighted_to(weights, totals);
  }
}

// tile[column][lane] = x[tokens[lane]][column]; there is room for a multiple of 8 columns
template <int LANES>
void transpose_tokens(const Products& p, const Tokens& tokens, float* tile) {
  const std::size_t width = p.width();
  if (LANES == 1) return load_tile(p.x.at(tokens[0] * width), p.x.dtype, width, tile);
  alignas(64) float lines[LANES * COLUMNS] = {};
  for (std::size_t begin = 0; begin < width; begin += COLUMNS) {
    const std::size_t n = std::min(COLUMNS, width - begin);
    for (std::size_t lane = 0; lane < tokens.count; ++lane)
      load_tile(p.x.at(tokens[lane] * width + begin), p.x.dtype, n, lines + lane * COLUMNS);
    for (std::size_t c = 0; c < n; c += 8)
      for (int lane = 0; lane < LANES; lane += 8)
        transpose_8x8(lines + lane * COLUMNS + c, COLUMNS, tile + (begin + c) * LANES + lane, LANES);
  }
}

template <class Number>
void add_to_run(const float* totals, std::size_t n, const Target& out, std::size_t start) {
  alignas(64) Number run[BLOCK];
  load_tile(out.at(start), out.dtype, n, run);
  for (std::size_t i = 0; i < n; ++i) run[i] += totals[i];
  store_tile(run, n, out.dtype, out.at(start));
}

template <int LANES>
void add_totals(const Products& p, const Tokens& tokens, std::size_t first, std::size_t n, const float* totals) {
  alignas(64) float lines[LANES * BLOCK];
  if (LANES > 1)
    for (std::size_t r = 0; r < n; r += 8)
      for (int lane = 0; lane < LANES; lane += 8)
        transpose_8x8(totals + r * LANES + lane, LANES, lines + lane * BLOCK + r, BLOCK);
  for (std::size_t lane = 0; lane < tokens.count; ++lane) {
    const float* line = LANES > 1 ? lines + lane * BLOCK : totals;
    (p.out.dtype == DType::f64 ? add_to_run<double> : add_to_run<float>)(line, n, p.out, tokens[lane] * p.rows() + first);
  }
}

template <int LANES>
void multiply(const Products& p, const Tokens& tokens, std::size_t first, std::size_t end) {
  const Scratch scratch((p.width() + 7) / 8 * 8 * LANES * sizeof(float));
  transpose_tokens<LANES>(p, tokens, scratch.floats());
  for (; first < end; first += BLOCK) {
    const std::size_t stop = std::min(end, first + BLOCK);
    alignas(64) float totals[BLOCK * LANES] = {}, weights[LANES] = {};
    for (const std::size_t e : *tokens.experts) {
      for (std::size_t lane = 0; lane < tokens.count; ++lane) weights[lane] = p.weight(tokens[lane], e);
      const auto& expert = p.experts[e];
      (expert.wide ? add_rows<LANES, std::uint32_t> : add_rows<LANES, std::uint16_t>)(expert, first, stop, scratch.floats(), weights, totals);
    }
    add_totals<LANES>(p, tokens, first, stop - first, totals);
  }
}

// Tokens by the experts that have a weight there, in order.
std::map<std::vector<std::size_t>, std::vector<std::size_t>> grouped(const Products& p, std::size_t groups) {
  std::map<std::vector<std::size_t>, std::vector<std::size_t>> found;
  std::vector<std::size_t> experts;
  for (std::size_t group = 0; group < groups; ++group) {
    experts.clear();
    for (std::size_t e = 0; e < p.E; ++e)
      if (p.weights[group * p.E + e] != 0) experts.push_back(e);
    if (experts.empty()) continue;
    auto& tokens = found[experts];
    for (std::size_t i = 0; i < p.tokens_in_group; ++i) tokens.push_back(group * p.tokens_in_group + i);
  }
  return found;
}

}  // namespace

void add_expert_products(const Source& x, const SparseSource* experts, const float* scales, const float* weights, std::size_t n,
                         std::size_t E, std::size_t groups, const Target& out) {
  if (n == 0 || E == 0 || experts[0].rows == 0) return;
  const Products products{x, experts, scales, weights, E, n / groups, out};
  const auto by_experts = grouped(products, groups);
  std::vector<Tokens> tiles;
  std::size_t work = 0;
  const int most = products.width() > WIDE ? MANY : MOST;
  for (const auto& [chosen, index] : by_experts) {
    std::size_t entries = 0;
    for (const std::size_t e : chosen) entries += static_cast<std::size_t>(experts[e].offsets[experts[e].rows]);
    for (std::size_t first = 0; first < index.size(); first += most) {
      tiles.push_back({&index, first, std::min<std::size_t>(most, index.size() - first), &chosen});
      work += entries * ((tiles.back().count + FEW - 1) / FEW);
    }
  }
  if (tiles.empty()) return;
  // few tiles are shared out by rows as well; where that is, and who computes it, changes no bit
  const std::size_t rows = products.rows(), wanted = std::min<std::size_t>(4 * threads(), work / WORTH_SHARING + 1);
  const std::size_t parts = std::max<std::size_t>(1, std::min((wanted + tiles.size() - 1) / tiles.size(), (rows + BLOCK - 1) / BLOCK));
  const std::size_t blocks = ((rows + BLOCK - 1) / BLOCK + parts - 1) / parts;
  const auto run = [&](std::size_t unit) {
    const Tokens& tokens = tiles[unit / parts];
    const std::size_t first = std::min(rows, unit % parts * blocks * BLOCK), end = std::min(rows, first + blocks * BLOCK);
    (tokens.count == 1 ? multiply<1> : tokens.count <= FEW ? multiply<FEW> : tokens.count <= MANY ? multiply<MANY> : multiply<MOST>)(products, tokens, first, end);
  };
  if (work > WORTH_SHARING) return parallel_with_torch(tiles.size() * parts, run);
  for (std::size_t unit = 0; unit < tiles.size() * parts; ++unit) run(unit);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
