// Masks: one bit an entry, entry i in bit i % 8 of byte i / 8. Tiles start at multiples of 8, so a tile's bits are whole bytes.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Entries of a tile as words of which all bits are set or none: they select by "and", and pass a NaN by.
using Keep = std::int32_t;

constexpr std::size_t KEEP_TILE = TILE;  // unpack_tile and pack_tile work on whole bytes: room for TILE entries whatever n

inline void unpack_tile(const std::uint8_t* mask, std::size_t start, std::size_t n, Keep* keep) {
  const std::uint8_t* bytes = mask + start / 8;
  for (std::size_t i = 0; i < (n + 7) / 8; ++i) {
    const Keep byte = bytes[i];
    for (int bit = 0; bit < 8; ++bit) keep[8 * i + bit] = -(byte >> bit & 1);
  }
}

// Entries of `keep` after the n-th count as not kept.
inline void pack_tile(Keep* keep, std::size_t n, std::uint8_t* mask, std::size_t start) {
  for (std::size_t i = n; i % 8 != 0; ++i) keep[i] = 0;
  std::uint8_t* bytes = mask + start / 8;
  for (std::size_t i = 0; i < (n + 7) / 8; ++i) {
    Keep byte = 0;
    for (int bit = 0; bit < 8; ++bit) byte |= keep[8 * i + bit] & 1 << bit;
    bytes[i] = static_cast<std::uint8_t>(byte);
  }
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
