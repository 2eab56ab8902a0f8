#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// out[r][c] = |expert - base| * max(0, sum over the row of p log(p / q)), p and q the softmax of the rows, each + 1e-8, in double
FREEMERGE_OP(void, fusion_importance,
             // inputs
             const Source& base,       // [rows, width]
             const Source& expert,     // [rows, width]
             std::size_t rows, std::size_t width,
             // output
             float* out)               // [rows, width]
