#include "freemerge/add_balanced.h"

#include <algorithm>
#include <vector>

#include "freemerge/threads.h"
#include "freemerge/tile.h"

namespace freemerge {
namespace FREEMERGE_ISA {

namespace {

inline float absolute(float value) { return value < 0 ? -value : value; }

// A NaN stays one.
inline float clip(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

inline float inverse_of(float low, float high) { return high == low ? 0.0f : 1.0f / (high - low); }

// e^x to about an ulp, in code that compilers turn into vectors: x = k ln 2 + r, e^r by the polynomial of Cephes' expf
inline float exponential(float x) {
  constexpr float ROUND = 12582912.0f;  // adding it rounds to an integer
  x = clip(x, -87.0f, 88.0f);
  const float k = (x * 1.44269504088896341f + ROUND) - ROUND;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const std::int32_t bits = (static_cast<std::int32_t>(k) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return (p * (r * r) + r + 1.0f) * power;
}

constexpr float SMALL = 0.625f;

// of |x| < SMALL; Cephes' tanhf
inline float small_tanh(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return p * z * x + x;
}

inline float large_tanh(float x) {
  const float size = 1.0f - 2.0f / (exponential(2.0f * absolute(x)) + 1.0f);
  return x < 0 ? -size : x > 0 ? size : x;  // NaN too
}

// values[i] = tanh(values[i])
void tanh_tile(float* values, std::size_t n) {
  std::int32_t large = 0;
  for (std::size_t i = 0; i < n; ++i) large |= -!(absolute(values[i]) < SMALL);
  if (large) {
    for (std::size_t i = 0; i < n; ++i) {
      const float small = small_tanh(values[i]), other = large_tanh(values[i]);
      values[i] = absolute(values[i]) < SMALL ? small : other;
    }
  } else {  // the rule: products of small changes
    for (std::size_t i = 0; i < n; ++i) values[i] = small_tanh(values[i]);
  }
}

struct Scores {
  const Source& base;
  const Source* experts;
  const float *lows, *highs;
  int T;
  bool normalized;

  // Tiles of every expert: the clipped task vectors with their signs, and the scores. `base_tile` is filled.
  void load(std::size_t start, std::size_t n, float* base_tile, float* clipped, float* scores) const {
    alignas(64) float sums[TILE];
    load_tile(base.at(start), base.dtype, n, base_tile);
    std::fill_n(sums, n, 0.0f);
    for (int t = 0; t < T; ++t) add_to(sums, t, start, n, base_tile, scores + t * TILE, clipped + t * TILE);
    for (int t = 0; t < T; ++t) score(sums, t, n, scores + t * TILE, clipped + t * TILE);
  }

 private:
  void add_to(float* sums, int t, std::size_t start, std::size_t n, const float* base_tile, float* vector, float* sizes) const {
    const float low = lows[t], high = highs[t], inverse = inverse_of(low, high);
    task_vector_tile(base, base_tile, experts[t], start, n, vector);
    for (std::size_t i = 0; i < n; ++i) sizes[i] = clip(absolute(vector[i]), low, high);
    if (normalized) {
      for (std::size_t i = 0; i < n; ++i) {
        const float share = (sizes[i] - low) * inverse;
        sums[i] += vector[i] > 0 ? share : vector[i] < 0 ? -share : 0.0f;
      }
    } else {
      for (std::size_t i = 0; i < n; ++i) sums[i] += vector[i];
    }
  }

  void score(const float* sums, int t, std::size_t n, float* vector, float* sizes) const {
    alignas(64) float inter[TILE];
    const float low = lows[t], inverse = inverse_of(low, highs[t]), count = static_cast<float>(T);
    for (std::size_t i = 0; i < n; ++i) inter[i] = vector[i] * sums[i];
    tanh_tile(inter, n);
    for (std::size_t i = 0; i < n; ++i) {
      const float share = (sizes[i] - low) * inverse, value = vector[i];
      sizes[i] = value < 0 ? -sizes[i] : value == 0 ? 0.0f : sizes[i];
      vector[i] = exponential(count * (share * share)) * inter[i];
    }
  }
};

struct Balanced {
  Scores scores;
  const float *floors, *tops, *weights;
  float least;

  void tile(std::size_t start, std::size_t n, float* clipped, float* score, const Target& out) const {
    alignas(64) float base_tile[TILE], total[TILE], divisor[TILE];
    scores.load(start, n, base_tile, clipped, score);
    std::fill_n(total, n, 0.0f);
    std::fill_n(divisor, n, 0.0f);
    for (int t = 0; t < scores.T; ++t) {
      const float floor = floors[t], top = tops[t], inverse = inverse_of(floor, top), weight = weights[t];
      for (std::size_t i = 0; i < n; ++i) {
        const float share = (clip(score[t * TILE + i], floor, top) - floor) * inverse;
        total[i] += weight * clipped[t * TILE + i] * share;
        divisor[i] += share;
      }
    }
    for (std::size_t i = 0; i < n; ++i) total[i] /= divisor[i] < least ? least : divisor[i];
    store_sum_tile(scores.base, base_tile, total, start, n, out);
  }
};

}  // namespace

void balance_scores(const Source& base, const Source* experts, const float* lows, const float* highs, int T, std::size_t n,
                    bool normalized, float* out) {
  const Scores scores{base, experts, lows, highs, T, normalized};
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::vector<float> clipped(static_cast<std::size_t>(T) * TILE), score(clipped.size());
    alignas(64) float base_tile[TILE];
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE) {
      const std::size_t size = std::min(TILE, end - start);
      scores.load(start, size, base_tile, clipped.data(), score.data());
      for (int t = 0; t < T; ++t) std::copy_n(score.data() + t * TILE, size, out + static_cast<std::size_t>(t) * n + start);
    }
  });
}

void add_balanced(const Source& base, const Source* experts, const float* lows, const float* highs, const float* floors,
                  const float* tops, const float* weights, int T, std::size_t n, bool normalized, float least, const Target& out) {
  const Balanced balanced{{base, experts, lows, highs, T, normalized}, floors, tops, weights, least};
  parallel_for((n + CHUNK - 1) / CHUNK, [&](std::size_t chunk) {
    std::vector<float> clipped(static_cast<std::size_t>(T) * TILE), score(clipped.size());
    const std::size_t end = std::min(n, (chunk + 1) * CHUNK);
    for (std::size_t start = chunk * CHUNK; start < end; start += TILE)
      balanced.tile(start, std::min(TILE, end - start), clipped.data(), score.data(), out);
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
