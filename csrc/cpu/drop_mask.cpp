#include "freemerge/drop_mask.h"

#include <algorithm>

#include "freemerge/mask.h"
#include "freemerge/philox.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

void drop_mask(std::size_t n, double probability, const std::uint32_t* key, std::uint8_t* mask) {
  const Philox philox{{key[0], key[1]}};
  const std::uint64_t limit = limit_of(probability);
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    if (limit > LOWER) {
      std::fill(mask + chunk * CHUNK / 8, mask + (end + 7) / 8, std::uint8_t{0xff});
      return;
    }
    const auto below = static_cast<std::uint32_t>(limit);
    for (std::size_t start = chunk * CHUNK; start < end; start += Philox::WORDS) {
      alignas(64) std::uint32_t words[Philox::WORDS];
      alignas(64) Keep keep[Philox::WORDS];
      philox.draw(start / 4, words);
      for (std::size_t i = 0; i < Philox::WORDS; ++i) keep[i] = -static_cast<Keep>(words[i] < below);
      pack_tile(keep, std::min(Philox::WORDS, end - start), mask, start);
    }
  });
  if (n % 8 != 0) mask[n / 8] &= static_cast<std::uint8_t>((1 << n % 8) - 1);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
