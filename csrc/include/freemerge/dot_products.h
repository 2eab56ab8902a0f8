#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// result[l][s][t] = sum of x_s * x_t over line l, x_t = float(arrays[t][i] - base[i]), in double.
// Lines are the rows of the matrix, or its columns.
FREEMERGE_OP(void, dot_products,
             // inputs
             const Source& base,       // [rows, width], or null: the arrays themselves
             const Source* arrays,     // [T] of [rows, width]
             int T, std::size_t rows, std::size_t width, bool by_column,
             // output
             double* result)           // [rows or width, T, T]
