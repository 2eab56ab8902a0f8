// Philox4x32-10 (Salmon et al. 2011): random words by their number, in any order.
// Compiled into each instruction set's namespace: include it in files of csrc/cpu only.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "freemerge/bf16_pairs.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// The words of a counter lie in the lower halves of 64-bit lanes: there they are multiplied. Upper halves hold anything.
typedef std::uint64_t Lanes __attribute__((vector_size(REGISTER)));
constexpr std::uint64_t LOWER = 0xffffffff;

inline Lanes multiply(Lanes words, std::uint32_t factor) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)words, _mm_set1_epi64x(factor));
#else
  return (words & LOWER) * factor;
#endif
}

struct Philox {
  static constexpr std::size_t GROUPS = 4, LANES = REGISTER / 8;  // several registers at once: a product takes its time
  static constexpr std::size_t COUNTERS = GROUPS * LANES, WORDS = 4 * COUNTERS;

  std::uint32_t key[2];

  // words[0 ... WORDS - 1] = those of the counters from `first` on, in order
  void draw(std::uint64_t first, std::uint32_t* words) const {
    Lanes w0[GROUPS] = {}, w1[GROUPS], w2[GROUPS], w3[GROUPS];
    for (std::size_t g = 0; g < GROUPS; ++g) {
      for (std::size_t lane = 0; lane < LANES; ++lane) w0[g][lane] = first + g * LANES + lane;
      w1[g] = w0[g] >> 32;
      w2[g] = w3[g] = Lanes{};
    }
    std::uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (std::size_t g = 0; g < GROUPS; ++g) {
        const Lanes p0 = multiply(w0[g], 0xD2511F53u), p1 = multiply(w2[g], 0xCD9E8D57u);
        w0[g] = (p1 >> 32) ^ w1[g] ^ std::uint64_t{k0};
        w2[g] = (p0 >> 32) ^ w3[g] ^ std::uint64_t{k1};
        w1[g] = p1;
        w3[g] = p0;
      }
    }
    std::uint64_t pairs[2][COUNTERS];
    for (std::size_t g = 0; g < GROUPS; ++g) {
      const Lanes front = (w0[g] & LOWER) | w1[g] << 32, back = (w2[g] & LOWER) | w3[g] << 32;
      std::memcpy(pairs[0] + g * LANES, &front, sizeof front);
      std::memcpy(pairs[1] + g * LANES, &back, sizeof back);
    }
    for (std::size_t c = 0; c < COUNTERS; ++c)
      for (std::size_t half = 0; half < 2; ++half) std::memcpy(words + 4 * c + 2 * half, &pairs[half][c], 8);
  }
};

// A word is kept if it is below this. 2^32 keeps all, so it takes more than 32 bits.
inline std::uint64_t limit_of(double probability) { return static_cast<std::uint64_t>(probability * 4294967296.0); }

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
