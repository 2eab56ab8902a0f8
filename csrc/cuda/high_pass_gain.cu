// The gain alone, on columns that cuFFT has transformed: they are too long for shared memory, or their length has a large prime factor.
#include "freemerge/gain.h"

using namespace freemerge::FREEMERGE_ISA;

// spectrum: [columns][lines], frequencies in natural order; times factor * (gain - less). Blocks: x over lines, y over columns.
// bounds: [columns][6]: inner, below and outer bound of column v, then of column -v
extern "C" __global__ void __launch_bounds__(256)
    high_pass_gain(float2* spectrum, const int* bounds, int lines, float less, float factor) {
  const int u = blockIdx.x * 256 + threadIdx.x;
  if (u >= lines) return;
  bounds += 6 * blockIdx.y;
  const int twice = gain(distance(u, lines), bounds[0], bounds[1], bounds[2]) +
                    gain(mirrored_distance(u, lines), bounds[3], bounds[4], bounds[5]);
  const float scale = factor * (0.5f * static_cast<float>(twice) - less);
  float2& value = spectrum[blockIdx.y * static_cast<long long>(lines) + u];
  value = make_float2(value.x * scale, value.y * scale);
}
