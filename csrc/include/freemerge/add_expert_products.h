#pragma once
#include "freemerge/apply_sparse_rows.h"

// out[i][r] = round( out[i][r] + sum_e w * scales[e] * (sum_k value_k * x[i][column_k]) ), k over the entries of row r of expert e,
// w = weights[i / (n / groups)][e]. Experts of weight 0 are left out, and a token without any keeps what it has, bit for bit.
FREEMERGE_OP(void, add_expert_products,
             // inputs
             const Source& x,                // [n, experts[0].width]
             const SparseSource* experts,    // [E], all of the same rows and width
             const float* scales,            // [E]
             const float* weights,           // [groups, E]; groups divides n
             std::size_t n, std::size_t E, std::size_t groups,
             // output
             const Target& out)              // [n, experts[0].rows]
