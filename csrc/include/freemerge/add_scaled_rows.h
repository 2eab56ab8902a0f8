#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// out[r][c] = round( base[r][c] + sum_t w * (arrays[t][r][c] - base[r][c]) ), w = weights[t][r], or weights[t][c] by column;
// without base round( sum_t w * arrays[t][r][c] )
FREEMERGE_OP(void, add_scaled_rows,
             // inputs
             const Source& base,       // [rows, width], or null
             const Source* arrays,     // [T] of [rows, width]
             const float* weights,     // [T, rows], or [T, width] by column
             int T, std::size_t rows, std::size_t width, bool by_column,
             // output
             const Target& out)        // [rows, width], may be one of the inputs
