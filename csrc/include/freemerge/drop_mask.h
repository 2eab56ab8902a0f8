#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// mask bit i = word i % 4 of Philox4x32-10 at counter i / 4 is below probability * 2^32
FREEMERGE_OP(void, drop_mask,
             // inputs
             std::size_t n, double probability, const std::uint32_t* key,   // [2]
             // output
             std::uint8_t* mask)                                            // [(n + 7) / 8]

// The same with the probability density - epsilon + 2 * epsilon * rank / (width - 1), rank that of |expert - base| by ascending
// magnitude along the second of three dimensions; among equals the lower index ranks higher
FREEMERGE_OP(void, ranked_drop_mask,
             // inputs
             const Source& base,       // [count, width, stride], or null: the expert is a task vector itself
             const Source& expert,     // [count, width, stride]
             std::size_t count, std::size_t width, std::size_t stride,
             double density, double epsilon, const std::uint32_t* key,      // [2]
             // output
             std::uint8_t* mask)
