// The columns of the lines' spectra: what the mask does to each, and the transform across the lines of those that need one.
#pragma once
#include <cstdint>
#include <vector>

#include "freemerge/fft.h"
#include "freemerge/high_pass.h"

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr std::size_t GROUP = 2 * LANES;   // real lines in one transform: line i of a group is the real part of lane i, line 16 + i its imaginary part

inline std::size_t groups_of(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

class Columns {
 public:
  explicit Columns(const HighPass& plan);

  // Columns v <= length/2 that are transformed across the lines: those with different gains in sweeps, all with a gain other than 1
  // in the complement. Column i of them lies in block i/16, lane i%16.
  const std::vector<std::uint32_t>& selected() const { return selected_; }
  // All columns with gain 1, any order; the others have gain 0
  const std::vector<std::uint32_t>& kept() const { return kept_; }

  std::size_t blocks() const { return groups_of(selected_.size(), LANES); }
  std::size_t block_floats() const { return plan_.lines() * POINT; }
  std::size_t floats() const { return blocks() * block_floats(); }

  // Filter the selected columns, in place: times factor * (gain - less). Inverse not normalised.
  // spectrum: [blocks][lines][POINT]
  void filter(float* spectrum, float less, float factor) const;

 private:
  enum class Kind { keep, drop, mixed };

  Kind kind(std::size_t v) const;
  void multiply(float* block_spectrum, std::size_t block, const Transform& transform, float less, float factor) const;

  const HighPass& plan_;
  std::vector<std::uint32_t> selected_, kept_;
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
