#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// out[i] = round( sum_t weights[t] * arrays[t][i] ), sum in float, one rounding
FREEMERGE_OP(void, weighted_sum,
             // inputs
             const Source* arrays,     // [T] arrays of [n]
             const float* weights,     // [T]
             int T, std::size_t n,
             // output
             const Target& out)        // [n], may be one of the arrays
