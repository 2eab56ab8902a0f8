// Masks: one bit an entry, entry i in bit i % 8 of byte i / 8. Tiles start at multiples of 8, so a tile's bits are whole bytes.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Entries of a tile as words of which all bits are set or none: they select by "and", and pass a NaN by.
using Keep = std::int32_t;

constexpr std::size_t KEEP_TILE = TILE;  // unpack_tile and pack_tile work on whole bytes: room for TILE entries whatever n

// Eight entries, those of a byte of a mask, in one or two registers.
typedef float Eight __attribute__((vector_size(32)));
typedef Keep EightKept __attribute__((vector_size(32)));

inline EightKept unpack(std::uint8_t byte) {
  constexpr EightKept BITS = {1, 2, 4, 8, 16, 32, 64, 128};
  return (BITS & Keep{byte}) == BITS;
}

inline std::uint8_t pack(const Keep* keep) {
#if defined(__AVX__)
  return static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(keep))));
#else
  Keep byte = 0;
  for (int bit = 0; bit < 8; ++bit) byte |= keep[bit] & 1 << bit;
  return static_cast<std::uint8_t>(byte);
#endif
}

inline void unpack_tile(const std::uint8_t* mask, std::size_t start, std::size_t n, Keep* keep) {
  const std::uint8_t* bytes = mask + start / 8;
  for (std::size_t i = 0; i < (n + 7) / 8; ++i) {
    const EightKept kept = unpack(bytes[i]);
    std::memcpy(keep + 8 * i, &kept, sizeof kept);
  }
}

// Entries of `keep` after the n-th count as not kept.
inline void pack_tile(Keep* keep, std::size_t n, std::uint8_t* mask, std::size_t start) {
  for (std::size_t i = n; i % 8 != 0; ++i) keep[i] = 0;
  for (std::size_t i = 0; i < (n + 7) / 8; ++i) mask[start / 8 + i] = pack(keep + 8 * i);
}

inline float masked(float value, Keep keep) {
  std::int32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= keep;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
