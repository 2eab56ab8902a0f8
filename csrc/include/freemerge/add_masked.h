#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// h_t = experts[t][i] - base[i] where masks[t] has bit i, else 0; kept are all of these, with votes only those of
// sign(votes[t] * h_t) = g, g = sum_t votes[t] * h_t >= 0 ? +1 : -1; Z = sum over the kept of weights[t] * h_t, with shares over
// max(least, sum of their shares[t]) (of 0: Z); out[i] = round( base[i] + scaling * Z )
FREEMERGE_OP(void, add_masked,
             // inputs
             const Source& base,                   // [n]
             const Source* experts,                // [T] arrays of [n]
             const std::uint8_t* const* masks,     // [T] of [(n + 7) / 8], null: every entry
             const float* weights,                 // [T]
             const float* votes,                   // [T], or null: no election
             const float* shares,                  // [T], or null: nothing is divided
             int T, std::size_t n, float least, float scaling,
             // output
             const Target& out)                    // [n], may be base itself
