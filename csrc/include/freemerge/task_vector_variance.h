#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// out[i] = sum_t (x_t - m)^2 / T, m = sum_t x_t / T, x_t = experts[t][i] - base[i], in float
FREEMERGE_OP(void, task_vector_variance,
             // inputs
             const Source& base,       // [n]
             const Source* experts,    // [T] arrays of [n]
             int T, std::size_t n,
             // output
             float* out)               // [n]
