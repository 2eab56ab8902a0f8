// The two ways to filter (kernels/high_pass.py chooses): both hand every run of the result to `output` and return the sum of its answers.
#pragma once
#include "freemerge/high_pass_columns.h"
#include "freemerge/high_pass_lines.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Transform all lines, filter the selected columns, transform back.
double filter_by_sweeps(const HighPass& plan, const Columns& columns, const Input& input, const Output& output, float* workspace);

// Subtract the low-pass: the selected columns only, by direct sums along rows.
double filter_by_complement(const HighPass& plan, const Columns& columns, const Input& input, const Output& output, float* workspace);

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
