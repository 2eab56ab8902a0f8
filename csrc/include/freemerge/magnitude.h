// Order statistics of magnitudes without sorting: the bits of |x|, read as an integer, are ordered as the numbers are.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include <algorithm>

#include "freemerge/magnitude_threshold.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr std::uint32_t INFINITE = 0x7f800000;

// NaN counts as infinite: it has to be found among the largest.
inline std::uint32_t magnitude_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return std::min(bits & 0x7fffffff, INFINITE);
}

inline float value_of(std::uint32_t magnitude) {
  float value;
  std::memcpy(&value, &magnitude, 4);
  return value;
}

// A Cut with its value as bits.
struct BitCut {
  std::uint32_t value;
  std::size_t ties;
};

constexpr BitCut NOTHING{INFINITE, 0};  // the cut at rank 0

// The cut at `rank` (0 to n) of magnitudes in memory; reorders them.
BitCut cut_in_place(std::uint32_t* magnitudes, std::size_t n, std::size_t rank);

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
