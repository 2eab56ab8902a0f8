#pragma once
#include <functional>

#include "freemerge/magnitude_threshold.h"

namespace freemerge {

// Compressed sparse rows to write; entries of row r are offsets[r] ... offsets[r + 1] - 1.
struct SparseTarget {
  std::int64_t* offsets;  // [rows + 1]
  void* columns;          // [count] uint16 where width <= 65536, else uint32
  float* values;          // [count]
};

// Called once, on the calling thread, when the number of entries is known.
using AllocateSparse = std::function<SparseTarget(std::size_t count)>;

}  // namespace freemerge

// The entries of rank first ... last - 1 by magnitude of expert - base; ties: lower index first
FREEMERGE_OP(void, sparse_rows,
             const Source& base,       // [rows, width], or null: the expert is a task vector itself
             const Source& expert,     // [rows, width]
             std::size_t rows, std::size_t width, std::size_t first, std::size_t last, const AllocateSparse& allocate)

// The same for each row
FREEMERGE_OP(void, sparse_rows_each,
             const Source& base, const Source& expert, std::size_t rows, std::size_t width, std::size_t first, std::size_t last,
             const AllocateSparse& allocate)

// The entries that `lower` takes and `upper` does not
FREEMERGE_OP(void, sparse_rows_between,
             const Source& base, const Source& expert, std::size_t rows, std::size_t width, const Cut& upper, const Cut& lower,
             const AllocateSparse& allocate)
