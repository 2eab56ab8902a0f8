// Order statistics of magnitudes without sorting: the bits of |x|, read as an integer, are ordered as the numbers are.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include <algorithm>

#include "freemerge/magnitude_threshold.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Signed, because vector units compare signed integers.
using Magnitude = std::int32_t;

constexpr Magnitude INFINITE = 0x7f800000;

// NaN counts as infinite: it has to be found among the largest.
inline Magnitude magnitude_of(float value) {
  Magnitude bits;
  std::memcpy(&bits, &value, 4);
  return std::min(bits & 0x7fffffff, INFINITE);
}

inline float value_of(Magnitude magnitude) {
  float value;
  std::memcpy(&value, &magnitude, 4);
  return value;
}

// Whether any of GROUP values has a magnitude of at least `floor`: one cheap test where few do.
constexpr std::size_t GROUP = 32;

inline bool any_reaches(const float* values, Magnitude floor) {
  Magnitude hits = 0;
  for (std::size_t i = 0; i < GROUP; ++i) {
    Magnitude bits;
    std::memcpy(&bits, values + i, 4);
    hits |= -((bits & 0x7fffffff) >= floor);  // a NaN reaches any floor as it is
  }
  return hits != 0;
}

// A Cut with its value as bits.
struct BitCut {
  Magnitude value;
  std::size_t ties;
};

// The cut at `rank` (0 to n) of magnitudes in memory.
BitCut find_cut(const Magnitude* magnitudes, std::size_t n, std::size_t rank);

// As magnitude_threshold, of ranks above 0, in two sweeps whatever the values.
Cut threshold_by_histograms(const std::vector<Pair>& tensors, std::size_t rank);

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
