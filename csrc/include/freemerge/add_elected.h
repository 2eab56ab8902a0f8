#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// Y_t = weights[t] * task_vectors[t]; g = sum_t Y_t >= 0 ? +1 : -1; Z = sum of the Y_t of sign g (normalize: over the sum of their weights);
// out[i] = round( base[i] + scaling * Z )
FREEMERGE_OP(void, add_elected,
             // inputs
             const Source& base,           // [n]
             const Source* task_vectors,   // [T] arrays of [n]
             const float* weights,         // [T]
             int T, std::size_t n, float scaling, bool normalize,
             // output
             const Target& out)            // [n], may be base itself
