#pragma once
#include <vector>

#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {

// The first `rank` entries in the order of magnitudes: those above `value` and the first `ties` of those equal to it.
struct Cut {
  float value;
  std::size_t ties;
};

// One tensor of several that are ranked together.
struct Pair {
  Source base;    // [n], or null: the expert is a task vector itself
  Source expert;  // [n]
  std::size_t n;
};

}  // namespace freemerge

// The cut at `rank` (0 to the number of elements) of |expert[i] - base[i]| over all the tensors together
FREEMERGE_OP(Cut, magnitude_threshold, const std::vector<Pair>& tensors, std::size_t rank)

// The cut at `rank` (0 to width) of each row
FREEMERGE_OP(void, row_thresholds,
             // inputs
             const Source& base,       // [rows, width], or null
             const Source& expert,     // [rows, width]
             std::size_t rows, std::size_t width, std::size_t rank,
             // output
             float* values,            // [rows]
             std::int64_t* ties)       // [rows]
