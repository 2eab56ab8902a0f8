#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// out[i] = round( array[i] + scale * vector[i] ) where `mask` has bit i, round( array[i] ) elsewhere
FREEMERGE_OP(void, add_masked_vector,
             // inputs
             const Source& array,          // [n]
             const Source& vector,         // [n]
             const std::uint8_t* mask,     // [(n + 7) / 8]
             float scale, std::size_t n,
             // output
             const Target& out)            // [n], may be array itself
