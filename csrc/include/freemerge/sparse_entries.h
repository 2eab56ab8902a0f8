// Entries of sparse rows, brought together from an array and put back, so that the conversions of tile.h apply to them.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include <algorithm>

#include "freemerge/apply_sparse_rows.h"
#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr std::size_t ENTRIES = 16384;  // the unit threads share

constexpr std::size_t GROUP = 128;      // entries at a time: their lines of cache, and those of the next, fill half of its first level

struct Gathered {
  alignas(64) unsigned char bytes[GROUP * 8];
};

template <std::size_t SIZE>
struct Bytes {  // an element of any dtype; addresses need no alignment
  unsigned char bytes[SIZE];
};

template <class Call>
inline void with_size(DType dtype, const Call& call) {
  switch (size_of(dtype)) {
    case 8: return call(Bytes<8>());
    case 4: return call(Bytes<4>());
    case 2: return call(Bytes<2>());
    default: return call(Bytes<1>());
  }
}

template <class Element>
inline void gather(const void* array, const std::size_t* index, std::size_t n, void* gathered) {
  for (std::size_t i = 0; i < n; ++i)
    std::memcpy(static_cast<char*>(gathered) + i * sizeof(Element), static_cast<const Element*>(array) + index[i], sizeof(Element));
}

// The linear indices of entries first ... end - 1; `row` is advanced to the row of the last one.
template <class Column>
inline void find_entries(const SparseSource& sparse, std::size_t first, std::size_t end, std::size_t& row, std::size_t* index) {
  const auto* columns = static_cast<const Column*>(sparse.columns);
  for (std::size_t entry = first; entry < end;) {
    while (static_cast<std::size_t>(sparse.offsets[row + 1]) <= entry) ++row;
    const std::size_t row_end = std::min(end, static_cast<std::size_t>(sparse.offsets[row + 1])), begin = row * sparse.width;
    for (; entry < row_end; ++entry) index[entry - first] = begin + columns[entry];
  }
}

// The lines of cache that entries lie in, on their way while others are worked on: nothing else foresees where those are.
template <class Element>
inline void fetch(const void* array, const std::size_t* index, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) __builtin_prefetch(static_cast<const Element*>(array) + index[i], 1);
  asm volatile("");  // else GCC holds a function of nothing but prefetches to have no effect, and leaves out the call
}

// Call body(first, n, index) for all entries, a few at a time: `n` entries from `first` on, and where each lies in the array.
template <class Body>
inline void for_entries(const SparseSource& sparse, const Target& array, const Body& body) {
  const auto count = static_cast<std::size_t>(sparse.offsets[sparse.rows]);
  parallel_for((count + ENTRIES - 1) / ENTRIES, [&](std::size_t unit) {
    std::size_t first = unit * ENTRIES, indices[2][GROUP];
    const std::size_t end = std::min(count, first + ENTRIES);
    std::size_t row = std::upper_bound(sparse.offsets, sparse.offsets + sparse.rows + 1, static_cast<std::int64_t>(first)) - sparse.offsets - 1;
    const auto find = [&](std::size_t begin, std::size_t* index) {
      const std::size_t stop = std::min(end, begin + GROUP);
      if (begin >= stop) return;
      (sparse.wide ? find_entries<std::uint32_t> : find_entries<std::uint16_t>)(sparse, begin, stop, row, index);
      with_size(array.dtype, [&](auto element) { fetch<decltype(element)>(array.data, index, stop - begin); });
    };
    std::size_t *index = indices[0], *next = indices[1];
    for (find(first, index); first < end; first += GROUP, std::swap(index, next)) {
      find(first + GROUP, next);
      body(first, std::min(GROUP, end - first), index);
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
