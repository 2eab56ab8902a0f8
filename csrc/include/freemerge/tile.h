// Between storage and arithmetic: a tile is a run of elements in float, small enough for the first-level cache.
// Every dtype is converted here, so that an op is written once, for float, and takes any mixture of dtypes.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include <cstring>

#include "freemerge/dtype.h"

#ifndef FREEMERGE_ISA
#error "csrc/cpu is compiled with -DFREEMERGE_ISA=portable|avx2|avx512"
#endif

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr std::size_t TILE = 1024;       // floats; three or four tiles fit 16 KiB
constexpr std::size_t CHUNK = 65536;     // elements: the unit threads share, and the unit sums are rounded in (never depends on threads)

// float <- storage, exact for every dtype but f64, which is rounded to nearest
void load_tile(const void* source, DType dtype, std::size_t n, float* tile);
// double <- storage, exact
void load_tile(const void* source, DType dtype, std::size_t n, double* tile);
// storage <- float, one rounding to nearest-even, overflow as the dtype has it (infinity; NaN for f8_e4m3fn)
void store_tile(const float* tile, std::size_t n, DType dtype, void* target);
// storage <- double, one rounding
void store_tile(const double* tile, std::size_t n, DType dtype, void* target);

// tile[i] = float(expert[i] - base[i]): the task vector. With a float64 on either side the difference is formed in double first.
// `base_tile` is base[i] as load_tile gives it, read once and used for every expert.
void task_vector_tile(const Source& base, const float* base_tile, const Source& expert, std::size_t start, std::size_t n,
                      float* tile);
// The same where the base is not needed for more than one expert; without a base the expert is a task vector itself.
void task_vector_tile(const Source& base, const Source& expert, std::size_t start, std::size_t n, float* tile);

// out[i] = round( base[i] + total[i] ). With a float64 base in double: an unchanged weight stays what it was. Overwrites `total`.
void store_sum_tile(const Source& base, const float* base_tile, float* total, std::size_t start, std::size_t n, const Target& out);

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
