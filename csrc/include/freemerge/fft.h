// Complex Fourier transforms of any length, in place, 16 of them at once: one in each lane, so that every operation is vertical.
// The number of lanes is the same for every instruction set: which lines share a transform, hence every bit of the result, does not depend on it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr std::size_t LANES = 16;
constexpr std::size_t POINT = 2 * LANES;   // floats: the real parts of one point of all lanes, then the imaginary parts

class Bluestein;

class Transform {
 public:
  explicit Transform(std::size_t n);
  ~Transform();

  static const Transform& of(std::size_t n);   // made once for each length

  // x: [n][POINT]. Frequency f comes out at point position()[f]; the inverse takes that order and is not normalised.
  // scratch: scratch_floats() of them, any contents
  void forward(float* x, float* scratch) const { forward_level(x, 0, scratch); }
  void inverse(float* x, float* scratch) const { inverse_level(x, 0, scratch); }

  std::size_t size() const { return n_; }
  std::size_t scratch_floats() const;
  const std::vector<std::uint32_t>& position() const { return position_; }

 private:
  using Pass = void (*)(float* x, std::size_t blocks, std::size_t m, const float* twiddles, int radix);

  // One radix of the decomposition: blocks of radix * m points, butterflies over points m apart.
  struct Level {
    int radix;
    std::size_t n, m;
    std::vector<float> twiddles;   // [m][radix - 1] complex numbers; for a radix without a butterfly of its own followed by its roots
    Pass forward, inverse;
  };

  void forward_level(float* x, std::size_t level, float* scratch) const;
  void inverse_level(float* x, std::size_t level, float* scratch) const;

  std::size_t n_;
  std::vector<Level> levels_;
  std::size_t leaf_ = 1;                  // what the radices leave: done by bluestein_
  std::unique_ptr<Bluestein> bluestein_;
  std::vector<std::uint32_t> position_;
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
