#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// tau_t = experts[t][i] - base[i]; g = sum_t tau_t > 0 ? +1 : -1; largest = max(0, max_t g * tau_t); out[i] = round( g * largest )
// (NaN where the sum is); masks[t] has bit i where g * tau_t > 0
// sums[2 t] = sum_i |tau_t|, sums[2 t + 1] = sum of `largest` over the bits of masks[t], before it is rounded
FREEMERGE_OP(void, unified_vector,
             // inputs
             const Source& base,             // [n]
             const Source* experts,          // [T] arrays of [n]
             int T, std::size_t n,
             // outputs
             std::uint8_t* const* masks,     // [T] of [(n + 7) / 8]
             const Target& out,              // [n]
             double* sums)                   // [T, 2]
