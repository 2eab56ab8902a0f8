#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// Of the entries of expert[i] - base[i] whose keys (ordered as the numbers are) have the bits of `found` above the digit:
// counts[d] = how many have d in the `width` bits that have `below` bits after them
FREEMERGE_OP(void, count_digits,
             // inputs
             const Source& base,       // [n], or null: the expert is a task vector itself
             const Source& expert,     // [n]
             std::size_t n, std::uint32_t found, int below, int width,
             bool magnitudes,          // of absolute values; NaN counts as infinite
             // output
             std::int64_t* counts)     // [2^width]
