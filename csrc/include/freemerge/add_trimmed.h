#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {
enum class Combination { mean, sum, max };
}  // namespace freemerge

// h_t = experts[t][i] - base[i] where its magnitude reaches floors[t], else 0; g = sign of sum_t h_t, `zeros` where that is 0;
// kept are h_t > 0 where g > 0, else h_t < 0; Z = their mean, their sum, or g * max |h_t|; out[i] = round( base[i] + scaling * Z )
FREEMERGE_OP(void, add_trimmed,
             // inputs
             const Source& base,          // [n]
             const Source* experts,       // [T] arrays of [n]
             const float* floors,         // [T]
             int T, std::size_t n, float zeros, Combination combination, float scaling,
             // output
             const Target& out)           // [n], may be base itself

// How many more of the sums are above 0 than below
FREEMERGE_OP(std::int64_t, sign_majority, const Source& base, const Source* experts, const float* floors, int T, std::size_t n)
