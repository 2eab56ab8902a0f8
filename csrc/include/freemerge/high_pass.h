#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

namespace freemerge {

// How one matrix is filtered; made by kernels/high_pass.py.
// Lines are its rows (axis 1) or its columns (axis 0); `length` points make a line, `lines` of them the matrix.
struct HighPass {
  std::size_t rows, columns;
  int axis;
  bool complement;    // subtract the low-pass, made by direct sums; otherwise transform every line
  bool stored;        // sweep 2 finds the columns of the lines' spectra in the workspace instead of transforming the lines again
  // The gain of coefficient (u, v), u across the lines and v along them, with d = |u - lines/2|:
  //     [d <= inner[v]] + [below[v] < d <= outer[v]]
  const std::int32_t* inner;   // [length]
  const std::int32_t* below;   // [length]
  const std::int32_t* outer;   // [length]

  std::size_t length() const { return axis == 1 ? columns : rows; }
  std::size_t lines() const { return axis == 1 ? rows : columns; }
};

// What is filtered: sum_t weights[t] * (experts[t] - base), in float; without a base the weighted sum of the experts.
struct TaskVectorSum {
  const Source* base;          // or null
  const Source* experts;       // [T]
  const float* weights;        // [T]
  int T;
};

}  // namespace freemerge

// Bytes of workspace the two functions below need
FREEMERGE_OP(std::size_t, high_pass_workspace, const HighPass& plan)

// out = round( base + F(sum) ), without the base where add_base is false
FREEMERGE_OP(void, high_pass,
             // inputs
             const HighPass& plan, const TaskVectorSum& sum, bool add_base,
             // workspace
             float* workspace,
             // output
             const Target& out)        // [rows, columns], may be the base

// the sum over all elements of |F(sum)|
FREEMERGE_OP(double, high_pass_magnitude, const HighPass& plan, const TaskVectorSum& sum, float* workspace)
