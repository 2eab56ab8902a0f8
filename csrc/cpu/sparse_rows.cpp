#include "freemerge/sparse_rows.h"

#include <atomic>
#include <cmath>
#include <iterator>

#include "freemerge/magnitude.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// The entries of a chunk that may be selected, in linear order.
struct Candidates {
  std::vector<std::uint16_t> index;  // within the chunk
  std::vector<float> values;
};
static_assert(CHUNK <= 65536, "an index within a chunk has 16 bits");

struct Matrix {
  const Source &base, &expert;
  std::size_t rows, width;

  std::size_t size() const { return rows * width; }
  std::size_t chunks() const { return (size() + CHUNK - 1) / CHUNK; }
  std::size_t chunk_end(std::size_t chunk) const { return std::min(size(), (chunk + 1) * CHUNK); }
};

// Entries between two cuts, met one after another.
struct Filter {
  BitCut upper, lower;

  bool passes(float value) {
    const Magnitude magnitude = magnitude_of(value);
    const bool above = belongs(upper, magnitude);
    return belongs(lower, magnitude) && !above;
  }

 private:
  static bool belongs(BitCut& cut, Magnitude magnitude) {
    if (magnitude != cut.value) return magnitude > cut.value;
    if (cut.ties == 0) return false;
    --cut.ties;
    return true;
  }
};

// How many entries of a chunk belong to a cut, ties not yet allotted.
struct ChunkCount {
  std::size_t greater = 0, equal = 0;

  void add(Magnitude magnitude, Magnitude value) {
    greater += magnitude > value;
    equal += magnitude == value;
  }

  // Takes this chunk's share of the ties left; answers how many entries belong.
  std::size_t allot(std::size_t& ties_left, std::size_t& share) const {
    share = std::min(equal, ties_left);
    ties_left -= share;
    return greater + share;
  }
};

// Where the entries of a chunk go.
struct ChunkPlan {
  Filter filter;
  std::size_t position;
};

class Writer {
 public:
  Writer(const Matrix& matrix, const SparseTarget& target) : matrix_(matrix), target_(target) {}

  // The entries of a run of elements that starts at `start`, and the offsets of all rows that start in the run.
  void write(std::size_t start, std::size_t end, const std::uint16_t* index, const float* values, std::size_t n, ChunkPlan plan) {
    matrix_.width <= 65536 ? write_as<std::uint16_t>(start, end, index, values, n, plan)
                           : write_as<std::uint32_t>(start, end, index, values, n, plan);
  }

  void finish(std::size_t count) { target_.offsets[matrix_.rows] = static_cast<std::int64_t>(count); }

 private:
  template <class Column>
  void write_as(std::size_t start, std::size_t end, const std::uint16_t* index, const float* values, std::size_t n, ChunkPlan& plan) {
    const std::size_t width = matrix_.width;
    std::size_t next_row = (start + width - 1) / width, next_start = next_row * width;
    const auto open_rows = [&](std::size_t upto) {
      for (; next_start <= upto; next_start += width) target_.offsets[next_row++] = static_cast<std::int64_t>(plan.position);
    };
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t linear = start + index[i];
      open_rows(linear);
      if (!plan.filter.passes(values[i])) continue;
      static_cast<Column*>(target_.columns)[plan.position] = static_cast<Column>(linear - (next_start - width));
      target_.values[plan.position++] = values[i];
    }
    open_rows(end - 1);
  }

  const Matrix& matrix_;
  const SparseTarget& target_;
};

// Append the entries with a magnitude of at least `floor`; answers how many. Writes one entry more than it keeps.
std::size_t append(const float* tile, std::size_t n, Magnitude floor, std::size_t position, std::uint16_t* index, float* values) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    index[count] = static_cast<std::uint16_t>(position + i);
    values[count] = tile[i];
    count += magnitude_of(tile[i]) >= floor;
  }
  return count;
}

// The entries of a chunk with a magnitude of at least `floor`; answers how many.
std::size_t collect(const Matrix& matrix, std::size_t chunk, Magnitude floor, std::uint16_t* index, float* values) {
  alignas(64) float tile[TILE];
  std::size_t count = 0;
  const std::size_t begin = chunk * CHUNK, end = matrix.chunk_end(chunk);
  for (std::size_t start = begin; start < end; start += TILE) {
    const std::size_t n = std::min(TILE, end - start);
    task_vector_tile(matrix.base, matrix.expert, start, n, tile);
    std::size_t i = 0;
    for (; i + GROUP <= n; i += GROUP)
      if (any_reaches(tile + i, floor)) count += append(tile + i, GROUP, floor, start - begin + i, index + count, values + count);
    count += append(tile + i, n - i, floor, start - begin + i, index + count, values + count);
  }
  return count;
}

// Room for all entries of a chunk, and one more (append).
struct Scratch {
  std::vector<std::uint16_t> index = std::vector<std::uint16_t>(CHUNK + 1);
  std::vector<float> values = std::vector<float>(CHUNK + 1);
};

Scratch& scratch() {
  thread_local Scratch mine;
  return mine;
}

// Give every chunk its share of the ties and its place in the output.
std::vector<ChunkPlan> allot(const std::vector<ChunkCount>& upper_counts, const std::vector<ChunkCount>& lower_counts, BitCut upper,
                             BitCut lower, std::size_t& position) {
  std::vector<ChunkPlan> plans(lower_counts.size());
  position = 0;
  for (std::size_t chunk = 0; chunk < plans.size(); ++chunk) {
    plans[chunk] = {{upper, lower}, position};
    const std::size_t without = upper_counts[chunk].allot(upper.ties, plans[chunk].filter.upper.ties);
    const std::size_t with = lower_counts[chunk].allot(lower.ties, plans[chunk].filter.lower.ties);
    position += with > without ? with - without : 0;
  }
  return plans;
}

// visit(chunk, index, values, n) for every chunk in parallel, with all entries of at least `floor`
template <class Visit>
void for_each_chunk(const Matrix& matrix, Magnitude floor, const Visit& visit) {
  parallel_for(matrix.chunks(), [&](std::size_t chunk) {
    Scratch& mine = scratch();
    const std::size_t n = collect(matrix, chunk, floor, mine.index.data(), mine.values.data());
    visit(chunk, mine.index.data(), mine.values.data(), n);
  });
}

// Select among entries that `each` enumerates as for_each_chunk does, twice: to count, to write.
template <class Each>
void select(const Matrix& matrix, const BitCut& upper, const BitCut& lower, const Each& each, const AllocateSparse& allocate) {
  std::vector<ChunkCount> upper_counts(matrix.chunks()), lower_counts(matrix.chunks());
  each([&](std::size_t chunk, const std::uint16_t*, const float* values, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      upper_counts[chunk].add(magnitude_of(values[i]), upper.value);
      lower_counts[chunk].add(magnitude_of(values[i]), lower.value);
    }
  });
  std::size_t count;
  const std::vector<ChunkPlan> plans = allot(upper_counts, lower_counts, upper, lower, count);
  const SparseTarget target = allocate(count);
  Writer writer(matrix, target);
  if (matrix.width == 0) std::fill_n(target.offsets, matrix.rows, 0);
  each([&](std::size_t chunk, const std::uint16_t* index, const float* values, std::size_t n) {
    writer.write(chunk * CHUNK, matrix.chunk_end(chunk), index, values, n, plans[chunk]);
  });
  writer.finish(count);
}

BitCut bits(const Cut& cut) { return {magnitude_of(cut.value), cut.ties}; }

// A magnitude that somewhat more than `last` entries should reach, judging by a sample of short runs all over the matrix.
Magnitude sampled_floor(const Matrix& matrix, std::size_t last) {
  constexpr std::size_t RUN = 16, SPACING = 512, MOST_RUNS = 4096;
  const std::size_t runs = std::min(MOST_RUNS, matrix.size() / SPACING);
  if (runs == 0) return 0;
  const std::size_t distance = matrix.size() / runs;
  std::vector<Magnitude> sample(runs * RUN);
  for (std::size_t run = 0; run < runs; ++run) {
    float tile[RUN];
    // Spread by a multiplicative hash: at equal distances they would keep to a few columns.
    const std::size_t shift = (run * 2654435761u & 0xffffffff) * (distance - RUN) >> 32;
    task_vector_tile(matrix.base, matrix.expert, run * distance + shift, RUN, tile);
    for (std::size_t i = 0; i < RUN; ++i) sample[run * RUN + i] = magnitude_of(tile[i]);
  }
  const double expected = static_cast<double>(sample.size()) * static_cast<double>(last) / static_cast<double>(matrix.size());
  const double rank = expected + 5 * std::sqrt(expected) + 8;  // where samples are independent, one in millions is worse
  if (rank >= static_cast<double>(sample.size())) return 0;
  return find_cut(sample.data(), sample.size(), static_cast<std::size_t>(rank)).value;
}

// All entries that reach the floor, or nothing if they are more than `most`.
std::vector<Candidates> candidates_above(const Matrix& matrix, Magnitude floor, std::size_t most, std::size_t& found) {
  std::vector<Candidates> chunks(matrix.chunks());
  std::atomic<std::size_t> total{0};
  parallel_for(matrix.chunks(), [&](std::size_t chunk) {
    if (total.load() > most) return;
    Scratch& mine = scratch();
    const std::size_t n = collect(matrix, chunk, floor, mine.index.data(), mine.values.data());
    if (total.fetch_add(n) + n > most) return;
    chunks[chunk] = {{mine.index.begin(), mine.index.begin() + n}, {mine.values.begin(), mine.values.begin() + n}};
  });
  found = total.load();
  return chunks;
}

// The common case in one sweep: collect what reaches a floor guessed from a sample, and rank that. Answers false where
// the guess was bad (too few) or many entries are tied (too many).
bool select_by_sample(const Matrix& matrix, std::size_t first, std::size_t last, const AllocateSparse& allocate) {
  const std::size_t most = 2 * last + matrix.size() / 16 + CHUNK;
  std::size_t found;
  const Magnitude floor = sampled_floor(matrix, last);
  const std::vector<Candidates> chunks = candidates_above(matrix, floor, most, found);
  if (found < last || found > most) return false;
  std::vector<Magnitude> magnitudes;
  magnitudes.reserve(found);
  for (const Candidates& chunk : chunks)
    std::transform(chunk.values.begin(), chunk.values.end(), std::back_inserter(magnitudes), magnitude_of);
  const BitCut lower = find_cut(magnitudes.data(), found, last);
  const BitCut upper = find_cut(magnitudes.data(), found, first);
  const auto each = [&](const auto& visit) {
    parallel_for(chunks.size(), [&](std::size_t chunk) {
      visit(chunk, chunks[chunk].index.data(), chunks[chunk].values.data(), chunks[chunk].values.size());
    });
  };
  select(matrix, upper, lower, each, allocate);
  return true;
}

}  // namespace

void sparse_rows_between(const Source& base, const Source& expert, std::size_t rows, std::size_t width, const Cut& upper,
                         const Cut& lower, const AllocateSparse& allocate) {
  const Matrix matrix{base, expert, rows, width};
  const auto each = [&](const auto& visit) { for_each_chunk(matrix, bits(lower).value, visit); };
  select(matrix, bits(upper), bits(lower), each, allocate);
}

void sparse_rows(const Source& base, const Source& expert, std::size_t rows, std::size_t width, std::size_t first, std::size_t last,
                 const AllocateSparse& allocate) {
  const Matrix matrix{base, expert, rows, width};
  if (select_by_sample(matrix, first, last, allocate)) return;
  const std::vector<Pair> tensor{{base, expert, matrix.size()}};
  sparse_rows_between(base, expert, rows, width, magnitude_threshold(tensor, first), magnitude_threshold(tensor, last), allocate);
}

void sparse_rows_each(const Source& base, const Source& expert, std::size_t rows, std::size_t width, std::size_t first,
                      std::size_t last, const AllocateSparse& allocate) {
  const std::size_t kept = last - first;
  const SparseTarget target = allocate(rows * kept);
  for (std::size_t row = 0; row <= rows; ++row) target.offsets[row] = static_cast<std::int64_t>(row * kept);
  if (kept == 0) return;
  const std::size_t rows_at_once = std::max<std::size_t>(1, CHUNK / width);
  parallel_for((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t block) {
    std::vector<float> values(width);
    std::vector<Magnitude> magnitudes(width);
    for (std::size_t row = block * rows_at_once; row < std::min(rows, (block + 1) * rows_at_once); ++row) {
      for (std::size_t column = 0; column < width; column += TILE)
        task_vector_tile(base, expert, row * width + column, std::min(TILE, width - column), values.data() + column);
      for (std::size_t column = 0; column < width; ++column) magnitudes[column] = magnitude_of(values[column]);
      Filter filter;
      filter.lower = find_cut(magnitudes.data(), width, last);
      filter.upper = find_cut(magnitudes.data(), width, first);
      std::size_t position = row * kept;
      for (std::size_t column = 0; column < width; ++column) {
        if (!filter.passes(values[column])) continue;
        if (width <= 65536) static_cast<std::uint16_t*>(target.columns)[position] = static_cast<std::uint16_t>(column);
        else static_cast<std::uint32_t*>(target.columns)[position] = static_cast<std::uint32_t>(column);
        target.values[position++] = values[column];
      }
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
