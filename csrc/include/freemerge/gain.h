// The high-pass mask's gain, the same on the CPU and on a GPU.
#pragma once
#include "freemerge/simd.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// The gain at distance d = |u - lines/2| of one column: [d <= inner] + [below < d <= outer] (kernels/_high_pass_plan.py).
FREEMERGE_INLINE int gain(int d, int inner, int below, int outer) { return (d <= inner) + ((d > below) & (d <= outer)); }

// The distances of frequency u and of its mirror image, lines - u. Gains are symmetrised: each of the two gives half.
FREEMERGE_INLINE int distance(int u, int lines) { return u < lines / 2 ? lines / 2 - u : u - lines / 2; }
FREEMERGE_INLINE int mirrored_distance(int u, int lines) { return distance(u == 0 ? 0 : lines - u, lines); }

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
