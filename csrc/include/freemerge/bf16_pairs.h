// bfloat16 in registers. Two neighbours are one 32-bit word: its upper half is one float already, its lower half the other after
// a shift. So nothing has to be widened or packed, on any processor; elements come as evens and odds, which elementwise
// arithmetic does not mind. Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include <cstdint>
#include <cstring>

namespace freemerge {
namespace FREEMERGE_ISA {

#if defined(__AVX512F__)
constexpr std::size_t REGISTER = 64;
#elif defined(__AVX2__)
constexpr std::size_t REGISTER = 32;
#else
constexpr std::size_t REGISTER = 16;
#endif

typedef float Floats __attribute__((vector_size(REGISTER)));
typedef std::int32_t Ints __attribute__((vector_size(REGISTER)));
typedef std::uint32_t Words __attribute__((vector_size(REGISTER)));

struct Bf16Pairs {
  static constexpr std::size_t COUNT = REGISTER / 2;  // elements
  Floats even, odd;

  void load(const void* source) {
    Words words;
    std::memcpy(&words, source, sizeof words);
    even = reinterpret(words << 16);
    odd = reinterpret(words & 0xffff0000);
  }

  void store(void* target) const {
    const Words words = rounded(even) >> 16 | (rounded(odd) & 0xffff0000);
    std::memcpy(target, &words, sizeof words);
  }

 private:
  static Floats reinterpret(const Words& words) { return (Floats)words; }

  // To nearest even, in the upper half; the lower half is what is left over. NaN stays NaN.
  static Words rounded(const Floats& values) {
    const Words bits = (Words)values;
    const Words nearest = bits + 0x7fff + (bits >> 16 & 1);
    return (Ints)(bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x400000) : nearest;
  }
};

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
