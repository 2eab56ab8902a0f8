// The filter across the lines, for the columns the mask cuts: transform, gain, transform back, one block a column of N lines.
// The last pass forward, the gain and the first pass back stay in registers.
#include "transform.h"
#include "freemerge/gain.h"

namespace freemerge {
namespace FREEMERGE_ISA {

struct FromColumn {
  const float2* values;

  __device__ __forceinline__ void operator()(Complex* x, int j) const {
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < radix_of(0); ++k) x[k] = {values[j + k * stride_of(0)].x, values[j + k * stride_of(0)].y};
  }
};

struct ToColumn {
  float2* values;

  __device__ __forceinline__ void operator()(const Complex* x, int j) const {
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < radix_of(0); ++k) values[j + k * stride_of(0)] = make_float2(x[k].re, x[k].im);
  }
};

struct Gain {
  int inner, below, outer, mirror_inner, mirror_below, mirror_outer;
  float less, factor;

  __device__ __forceinline__ void operator()(Complex* x, int frequency, int step) const {
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < radix_of(PASSES - 1); ++k) {
      const int u = frequency + k * step;
      const int twice = gain(distance(u, N), inner, below, outer) + gain(mirrored_distance(u, N), mirror_inner, mirror_below, mirror_outer);
      const float scale = factor * (0.5f * static_cast<float>(twice) - less);
      x[k] = {x[k].re * scale, x[k].im * scale};
    }
  }
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge

using namespace freemerge::FREEMERGE_ISA;

// spectrum: [columns][N], in place: times factor * (gain - less); the inverse is not normalised
// bounds: [columns][6]: inner, below and outer bound of column v, then of column -v
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    high_pass_across(float2* spectrum, const int* bounds, const float2* table, float less, float factor) {
  DYNAMIC_SHARED(float2, memory);
  const Points points{memory};
  float2* column = spectrum + blockIdx.x * static_cast<long long>(N);
  bounds += 6 * blockIdx.x;
  forward_first(points, table, FromColumn{column});
  forward_passes<1, PASSES - 1>(points, table);
  turn(points, Gain{bounds[0], bounds[1], bounds[2], bounds[3], bounds[4], bounds[5], less, factor});
  inverse_passes<PASSES - 1>(points, table);
  inverse_last(points, table, ToColumn{column});
}
