#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {
struct MagnitudeCounts {
  std::size_t greater, equal;
};
}  // namespace freemerge

// How many |expert[i] - base[i]| are greater than `value`, and how many equal to it
FREEMERGE_OP(MagnitudeCounts, count_magnitudes,
             const Source& base,       // [n], or null: the expert is a task vector itself
             const Source& expert,     // [n]
             std::size_t n, float value)
