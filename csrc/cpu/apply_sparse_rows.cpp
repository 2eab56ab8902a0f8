#include "freemerge/apply_sparse_rows.h"

#include <algorithm>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr std::size_t ENTRIES = 16384;  // the unit threads share

// Elements scattered over an array, brought together so that the conversions of tile.h apply.
struct Gathered {
  alignas(64) unsigned char bytes[TILE * 8];
};

template <std::size_t SIZE>
struct Bytes {  // an element of any dtype; addresses need no alignment
  unsigned char bytes[SIZE];
};

template <class Element>
static void gather(const void* array, const std::size_t* index, std::size_t n, Gathered& gathered) {
  for (std::size_t i = 0; i < n; ++i)
    std::memcpy(gathered.bytes + i * sizeof(Element), static_cast<const Element*>(array) + index[i], sizeof(Element));
}

template <class Element>
static void scatter(const Gathered& gathered, const std::size_t* index, const float* values, std::size_t n, void* array) {
  for (std::size_t i = 0; i < n; ++i)
    if (values[i] != 0) std::memcpy(static_cast<Element*>(array) + index[i], gathered.bytes + i * sizeof(Element), sizeof(Element));
}

template <class Call>
static void with_size(DType dtype, const Call& call) {
  switch (size_of(dtype)) {
    case 8: return call(Bytes<8>());
    case 4: return call(Bytes<4>());
    case 2: return call(Bytes<2>());
    default: return call(Bytes<1>());
  }
}

static void add_entries(const Source& from, const float* values, float scale, std::size_t n, DType dtype, Gathered& result) {
  if (from.dtype == DType::f64) {
    alignas(64) double exact[TILE];
    load_tile(from.data, from.dtype, n, exact);
    for (std::size_t i = 0; i < n; ++i) exact[i] += scale * values[i];
    store_tile(exact, n, dtype, result.bytes);
    return;
  }
  alignas(64) float sum[TILE];
  load_tile(from.data, from.dtype, n, sum);
  for (std::size_t i = 0; i < n; ++i) sum[i] += scale * values[i];
  store_tile(sum, n, dtype, result.bytes);
}

// The linear indices of entries first ... end - 1; `row` is advanced to the row of the last one.
static void find_entries(const SparseSource& sparse, std::size_t first, std::size_t end, std::size_t& row, std::size_t* index) {
  for (std::size_t entry = first; entry < end; ++entry) {
    while (static_cast<std::size_t>(sparse.offsets[row + 1]) <= entry) ++row;
    const std::size_t column = sparse.wide ? static_cast<const std::uint32_t*>(sparse.columns)[entry]
                                           : static_cast<const std::uint16_t*>(sparse.columns)[entry];
    index[entry - first] = row * sparse.width + column;
  }
}

static void apply_entries(const Source& array, const SparseSource& sparse, float scale, const Source& start, const Target& out,
                          std::size_t first, std::size_t end) {
  Gathered gathered, result;
  std::size_t index[TILE];
  std::size_t row = std::upper_bound(sparse.offsets, sparse.offsets + sparse.rows + 1, static_cast<std::int64_t>(first)) - sparse.offsets - 1;
  for (; first < end; first += TILE) {
    const std::size_t n = std::min(TILE, end - first);
    find_entries(sparse, first, first + n, row, index);
    Source from{start ? start.at(first) : gathered.bytes, start ? start.dtype : array.dtype};
    if (!start) with_size(array.dtype, [&](auto element) { gather<decltype(element)>(array.data, index, n, gathered); });
    add_entries(from, sparse.values + first, scale, n, out.dtype, result);
    with_size(out.dtype, [&](auto element) { scatter<decltype(element)>(result, index, sparse.values + first, n, out.data); });
  }
}

template <class Number>
static void convert(const Source& array, std::size_t start, std::size_t n, const Target& out) {
  alignas(64) Number tile[TILE];
  load_tile(array.at(start), array.dtype, n, tile);
  store_tile(tile, n, out.dtype, out.at(start));
}

static void copy(const Source& array, std::size_t n, const Target& out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::size_t start = chunk * CHUNK;
    const std::size_t end = std::min(n, start + CHUNK);
    if (array.dtype == out.dtype) {
      std::memcpy(out.at(start), array.at(start), (end - start) * size_of(out.dtype));
      return;
    }
    for (; start < end; start += TILE)
      (array.dtype == DType::f64 ? convert<double> : convert<float>)(array, start, std::min(TILE, end - start), out);
  });
}

void apply_sparse_rows(const Source& array, const SparseSource& sparse, float scale, const Source& start, const Target& out) {
  if (array.data != out.data) copy(array, sparse.rows * sparse.width, out);
  const auto count = static_cast<std::size_t>(sparse.offsets[sparse.rows]);
  parallel_for((count + ENTRIES - 1) / ENTRIES, [&](std::size_t unit) {
    apply_entries(array, sparse, scale, start, out, unit * ENTRIES, std::min(count, (unit + 1) * ENTRIES));
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
