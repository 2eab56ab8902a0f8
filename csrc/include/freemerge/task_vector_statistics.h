#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// result[0..3] = sum, sum of magnitudes, sum of squares and largest magnitude of float(expert[i] - base[i]), in double
FREEMERGE_OP(void, task_vector_statistics,
             // inputs
             const Source& base,       // [n], or null: the expert is a task vector itself
             const Source& expert,     // [n]
             std::size_t n,
             // output
             double* result)           // [4]
