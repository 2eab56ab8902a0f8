#include "freemerge/apply_sparse_rows.h"

#include "freemerge/sparse_entries.h"

namespace freemerge {
namespace FREEMERGE_ISA {

template <class Element>
static void scatter(const Gathered& gathered, const std::size_t* index, const float* values, std::size_t n, void* array) {
  for (std::size_t i = 0; i < n; ++i)
    if (values[i] != 0) std::memcpy(static_cast<Element*>(array) + index[i], gathered.bytes + i * sizeof(Element), sizeof(Element));
}

static void add_entries(const Source& from, const float* values, float scale, std::size_t n, DType dtype, Gathered& result) {
  if (from.dtype == DType::f64) {
    alignas(64) double exact[GROUP];
    load_tile(from.data, from.dtype, n, exact);
    for (std::size_t i = 0; i < n; ++i) exact[i] += scale * values[i];
    store_tile(exact, n, dtype, result.bytes);
    return;
  }
  alignas(64) float sum[GROUP];
  load_tile(from.data, from.dtype, n, sum);
  for (std::size_t i = 0; i < n; ++i) sum[i] += scale * values[i];
  store_tile(sum, n, dtype, result.bytes);
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

void apply_sparse_rows(const Source& array, const SparseSource& sparse, float scale, const Source& start, const Target& out,
                       const Target& kept) {
  if (array.data != out.data) copy(array, sparse.rows * sparse.width, out);
  for_entries(sparse, out, [&](std::size_t first, std::size_t n, const std::size_t* index) {
    Gathered gathered, result;
    const Source from{start ? start.at(first) : gathered.bytes, start ? start.dtype : array.dtype};
    if (!start || kept.data)
      with_size(array.dtype, [&](auto element) { gather<decltype(element)>(array.data, index, n, gathered.bytes); });
    if (kept.data) std::memcpy(kept.at(first), gathered.bytes, n * size_of(array.dtype));
    add_entries(from, sparse.values + first, scale, n, out.dtype, result);
    with_size(out.dtype, [&](auto element) { scatter<decltype(element)>(result, index, sparse.values + first, n, out.data); });
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
