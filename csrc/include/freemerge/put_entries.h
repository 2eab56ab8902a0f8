#pragma once
#include "freemerge/apply_sparse_rows.h"

// array = entries[i] at the i-th entry of the sparse rows, bit for bit; values are not looked at
FREEMERGE_OP(void, put_entries,
             // inputs
             const SparseSource& sparse,
             const void* entries,      // [count] of the dtype of array
             // output
             const Target& array)      // [rows, width]
