#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {

// Compressed sparse rows to read: offsets ascend from 0 to their end, columns lie below width.
struct SparseSource {
  const std::int64_t* offsets;  // [rows + 1]
  const void* columns;          // [offsets[rows]] uint32 if wide, else uint16
  bool wide;
  const float* values;          // [offsets[rows]]
  std::size_t rows, width;
};

}  // namespace freemerge

// out = array, but round(s + scale * value) at entries with value != 0; s = start's number for the entry, without start array's own
FREEMERGE_OP(void, apply_sparse_rows,
             // inputs
             const Source& array,         // [rows, width]
             const SparseSource& sparse, float scale,
             const Source& start,         // [count], or null
             // output
             const Target& out,           // [rows, width]; may be array itself, then only entries are touched
             const Target& kept)          // [count] of the dtype of array, or null: what array holds at each entry
