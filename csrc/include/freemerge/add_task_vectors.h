#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// out[i] = round( base[i] + sum_t weights[t] * (experts[t][i] - base[i]) ), differences and sum in float, one rounding
FREEMERGE_OP(void, add_task_vectors,
             // inputs
             const Source& base,       // [n]
             const Source* experts,    // [T] arrays of [n]
             const float* weights,     // [T]
             int T, std::size_t n,
             // output
             const Target& out)        // [n], may be base itself
