#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// result[0..3] = number of bits of the mask, sum of |expert[i] - base[i]|, the same of the kept entries, and the sum of their squares
FREEMERGE_OP(void, mask_statistics,
             // inputs
             const Source& base,           // [n], or null: the expert is a task vector itself
             const Source& expert,         // [n]
             const std::uint8_t* mask,     // [(n + 7) / 8]
             std::size_t n,
             // output
             double* result)               // [4]
