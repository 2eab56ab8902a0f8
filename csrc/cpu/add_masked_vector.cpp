#include "freemerge/add_masked_vector.h"

#include <algorithm>

#include "freemerge/mask.h"
#include "freemerge/threads.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// `value`, or the zero that changes nothing it is added to, not even another zero's sign.
static inline float kept_or_nothing(float value, Keep keep) {
  std::int32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits & keep) | (~keep & static_cast<std::int32_t>(0x80000000u));
  std::memcpy(&value, &bits, 4);
  return value;
}

void add_masked_vector(const Source& array, const Source& vector, const std::uint8_t* mask, float scale, std::size_t n, const Target& out) {
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    alignas(64) float values[TILE], start_tile[TILE];
    alignas(64) Keep keep[KEEP_TILE];
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE) {
      const std::size_t size = std::min(TILE, end - start);
      load_tile(array.at(start), array.dtype, size, start_tile);
      load_tile(vector.at(start), vector.dtype, size, values);
      unpack_tile(mask, start, size, keep);
      for (std::size_t i = 0; i < size; ++i) values[i] = kept_or_nothing(scale * values[i], keep[i]);
      store_sum_tile(array, start_tile, values, start, size, out);
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
