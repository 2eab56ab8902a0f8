#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {

// Keys from low to low + (bins << shift) - 1, in bins of 2^shift each.
struct KeyRange {
  std::uint32_t low;
  int shift;
};

}  // namespace freemerge

// Of the keys (ordered as the numbers are) of expert[i] - base[i], for each range: how many are below it, in each bin, above it
FREEMERGE_OP(void, count_range,
             // inputs
             const Source& base,       // [n], or null: the expert is a task vector itself
             const Source& expert,     // [n]
             std::size_t n,
             const KeyRange* ranges, std::size_t count, std::size_t bins,
             bool magnitudes,          // of absolute values; NaN counts as infinite
             // output
             std::int64_t* counts)     // [count, bins + 2]
