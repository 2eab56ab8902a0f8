#include "freemerge/unified_vector.h"

#include <algorithm>
#include <vector>

#include "freemerge/simd.h"
#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

// Sums are formed in this many lanes whatever the width of a register, so that every instruction set gives the same bits.
constexpr std::size_t LANES = 16, QUARTERS = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));
typedef std::int32_t Words __attribute__((vector_size(16)));

inline void add(const Floats& values, Doubles& sum) {
#if defined(__AVX__)
  sum += (Doubles)_mm256_cvtps_pd((__m128)values);
#else
  sum += __builtin_convertvector(values, Doubles);
#endif
}

// A bit for each of eight numbers above zero.
inline std::uint8_t positive(const float* eight) {
#if defined(__AVX__)
  return static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(eight), _mm256_setzero_ps(), _CMP_GT_OQ)));
#else
  int bits = 0;
  for (int i = 0; i < 8; ++i) bits |= (eight[i] > 0) << i;
  return static_cast<std::uint8_t>(bits);
#endif
}

struct Sums {
  Doubles moved[QUARTERS] = {}, kept[QUARTERS] = {};

  // `along` are changes in the direction of most of the change.
  void add_tile(const float* along, const float* largest, std::size_t padded) {
    Doubles all[QUARTERS], agreeing[QUARTERS];  // not the members, which the compiler would keep in memory
    std::copy_n(moved, QUARTERS, all);
    std::copy_n(kept, QUARTERS, agreeing);
    for (std::size_t i = 0; i < padded; i += LANES) {
      FREEMERGE_UNROLL(4)
      for (std::size_t quarter = 0; quarter < QUARTERS; ++quarter) {
        Floats change, most;
        std::memcpy(&change, along + i + 4 * quarter, 16);
        std::memcpy(&most, largest + i + 4 * quarter, 16);
        add((Floats)((Words)change & 0x7fffffff), all[quarter]);
        add((Floats)((Words)most & (change > 0.0f)), agreeing[quarter]);
      }
    }
    std::copy_n(all, QUARTERS, moved);
    std::copy_n(agreeing, QUARTERS, kept);
  }
};

double total(const Doubles* quarters) {
  double sum = quarters[0][0];
  for (std::size_t lane = 1; lane < LANES; ++lane) sum += quarters[lane / 4][lane % 4];
  return sum;
}

struct Unified {
  const Source& base;
  const Source* experts;
  int T;
  std::uint8_t* const* masks;
  const Target& out;

  // `values` has room for T tiles: a sum has to be known before any entry is kept.
  void tile(std::size_t start, std::size_t n, float* values, Sums* sums) const {
    alignas(64) float base_tile[TILE], largest[TILE], unified[TILE];
    const std::size_t padded = (n + LANES - 1) / LANES * LANES;
    load_tile(base.at(start), base.dtype, n, base_tile);
    for (int t = 0; t < T; ++t) {
      float* mine = values + t * TILE;
      task_vector_tile(base, base_tile, experts[t], start, n, mine);
      std::fill(mine + n, mine + padded, 0.0f);
    }
    for (std::size_t i = 0; i < padded; i += WIDTH) turn(values + i, largest + i, unified + i);
    for (int t = 0; t < T; ++t) {
      const float* mine = values + t * TILE;
      sums[t].add_tile(mine, largest, padded);
      std::uint8_t* bits = masks[t] + start / 8;
      for (std::size_t i = 0; i < n; i += 8) bits[i / 8] = positive(mine + i);
    }
    store_tile(unified, n, out.dtype, out.at(start));
  }

 private:
  // Changes become positive where they go the way their sum goes; `largest` is the largest of these, 0 if there is none.
  void turn(float* values, float* largest, float* unified) const {
    Vec sum = load(values);
    for (int t = 1; t < T; ++t) sum += load(values + t * TILE);
    const auto up = sum > splat(0.0f);
    const VecBits flip = ~(VecBits)up & 0x80000000u;
    Vec most = splat(0.0f);
    for (int t = 0; t < T; ++t) {
      const Vec along = (Vec)((VecBits)load(values + t * TILE) ^ flip);
      store(values + t * TILE, along);
      most = along > most ? along : most;
    }
    most = sum == sum ? most : sum;
    store(largest, most);
    store(unified, up ? most : splat(0.0f) - most);  // never -0
  }
};

}  // namespace

void unified_vector(const Source& base, const Source* experts, int T, std::size_t n, std::uint8_t* const* masks, const Target& out,
                    double* sums) {
  const Unified unified{base, experts, T, masks, out};
  const std::size_t count = static_cast<std::size_t>(T), chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<double> found(chunks * count * 2);
  parallel_for(chunks, [&](std::size_t chunk) {
    std::vector<float> values(count * TILE);
    std::vector<Sums> mine(count);
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      unified.tile(start, std::min(TILE, end - start), values.data(), mine.data());
    for (std::size_t t = 0; t < count; ++t) {
      found[(chunk * count + t) * 2] = total(mine[t].moved);
      found[(chunk * count + t) * 2 + 1] = total(mine[t].kept);
    }
  });
  std::fill_n(sums, count * 2, 0.0);
  for (std::size_t i = 0; i < found.size(); ++i) sums[i % (count * 2)] += found[i];
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
