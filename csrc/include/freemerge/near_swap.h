#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// k = clip( t / max(|base[i] - expert[i]|, 1e-6), 0, 1 ); out[i] = round( k * expert[i] + (1 - k) * base[i] )
FREEMERGE_OP(void, near_swap,
             // inputs
             const Source& base,       // [n]
             const Source& expert,     // [n]
             std::size_t n, float t,
             // output
             const Target& out)        // [n], may be one of the inputs
