#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {

// To a cut belong the entries above its value and the first `ties` of those equal to it.
struct Cuts {
  const float* values;
  const std::int64_t* ties;
};

}  // namespace freemerge

// mask bit i = |expert[i] - base[i]| belongs to `lower` and not to `upper`
FREEMERGE_OP(void, magnitude_mask,
             // inputs
             const Source& base,       // [rows, width], or null: the expert is a task vector itself
             const Source& expert,     // [rows, width]
             std::size_t rows, std::size_t width,
             const Cuts& lower,        // [1] for all entries together, or [rows] for those of each row
             const Cuts& upper,        // as many
             bool of_each_row,
             // output
             std::uint8_t* mask)       // [(rows * width + 7) / 8]
