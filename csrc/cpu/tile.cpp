#include "freemerge/tile.h"

#include <cmath>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace freemerge {
namespace FREEMERGE_ISA {

// Mapped files give no alignment: these may lie anywhere, and the compiler must not assume otherwise.
typedef double unaligned_f64 __attribute__((aligned(1)));
typedef float unaligned_f32 __attribute__((aligned(1)));
typedef std::uint16_t unaligned_u16 __attribute__((aligned(1)));

static inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// ---- a small float (sign, exponent, mantissa) in 8 or 16 bits, by integer arithmetic ----

// Multiplying by a power of two turns the small type's subnormals into normal floats, exactly.
template <int EXPONENT, int MANTISSA>
static inline float from_small(std::uint32_t bits) {
  constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
  const std::uint32_t sign = (bits >> (EXPONENT + MANTISSA)) << 31;
  const std::uint32_t magnitude = (bits & ((1u << (EXPONENT + MANTISSA)) - 1)) << (23 - MANTISSA);
  return float_of(bits_of(float_of(magnitude) * float_of((127 + 127 - BIAS) << 23)) | sign);
}

static inline float from_f16(std::uint32_t bits) {
  if ((bits & 0x7c00) == 0x7c00) return float_of((bits & 0x8000) << 16 | 0x7f800000 | (bits & 0x3ff) << 13);
  return from_small<5, 10>(bits);
}

static inline float from_e5m2(std::uint32_t bits) { return from_f16(bits << 8); }

static inline float from_e4m3fn(std::uint32_t bits) {
  if ((bits & 0x7f) == 0x7f) return float_of((bits & 0x80) << 24 | 0x7fc00000);
  return from_small<4, 3>(bits);
}

// Round to nearest even. Above the largest finite value: `overflow`. NaN: `nan`.
template <int EXPONENT, int MANTISSA>
static inline std::uint32_t to_small(float value, std::uint32_t largest, std::uint32_t overflow, std::uint32_t nan) {
  constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
  const std::uint32_t bits = bits_of(value), sign = (bits >> 31) << (EXPONENT + MANTISSA);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | nan;
  std::uint32_t small;
  if (magnitude < (std::uint32_t)(128 - BIAS) << 23) {  // subnormal there: let the float adder round, at the weight of its last bit
    const float shifter = float_of((std::uint32_t)(127 - BIAS + 1 + 23 - MANTISSA) << 23);
    small = bits_of(float_of(magnitude) + shifter) - bits_of(shifter);
  } else {
    const std::uint32_t odd = (magnitude >> (23 - MANTISSA)) & 1;
    small = (magnitude - ((std::uint32_t)(127 - BIAS) << 23) + ((1u << (22 - MANTISSA)) - 1) + odd) >> (23 - MANTISSA);
  }
  return sign | (small > largest ? overflow : small);
}

static inline std::uint16_t to_f16(float value) { return to_small<5, 10>(value, 0x7bff, 0x7c00, 0x7e00); }
static inline std::uint8_t to_e5m2(float value) { return to_small<5, 2>(value, 0x7b, 0x7c, 0x7e); }
static inline std::uint8_t to_e4m3fn(float value) { return to_small<4, 3>(value, 0x7e, 0x7f, 0x7f); }

static inline std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}

// double to float by "round to odd": the bits lost are remembered in the last one, so that the next rounding is as good as the only one
static inline float to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(value)) return nearest;
  const std::uint32_t bits = bits_of(nearest);
  if (bits & 1) return nearest;
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(value);  // nearest overshot: the odd neighbour is below it
  return float_of(away ? bits - 1 : bits + 1);
}

// ---- tiles ----

static void load_f16(const unaligned_u16* source, std::size_t n, float* tile) {
  std::size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
  for (; i < n; ++i) tile[i] = from_f16(source[i]);
}

static void store_f16(const float* tile, std::size_t n, unaligned_u16* target) {
  std::size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) target[i] = to_f16(tile[i]);
}

void load_tile(const void* source, DType dtype, std::size_t n, float* tile) {
  const auto* bytes = static_cast<const std::uint8_t*>(source);
  const auto* halves = static_cast<const unaligned_u16*>(source);
  switch (dtype) {
    case DType::f64:
      for (std::size_t i = 0; i < n; ++i) tile[i] = static_cast<float>(static_cast<const unaligned_f64*>(source)[i]);
      return;
    case DType::f32: std::memcpy(tile, source, n * 4); return;
    case DType::f16: load_f16(halves, n, tile); return;
    case DType::bf16:
      for (std::size_t i = 0; i < n; ++i) tile[i] = float_of(static_cast<std::uint32_t>(halves[i]) << 16);
      return;
    case DType::f8_e4m3fn:
      for (std::size_t i = 0; i < n; ++i) tile[i] = from_e4m3fn(bytes[i]);
      return;
    case DType::f8_e5m2:
      for (std::size_t i = 0; i < n; ++i) tile[i] = from_e5m2(bytes[i]);
      return;
  }
}

void load_tile(const void* source, DType dtype, std::size_t n, double* tile) {
  if (dtype == DType::f64) {
    std::memcpy(tile, source, n * 8);
    return;
  }
  alignas(64) float narrow[TILE];
  for (std::size_t start = 0; start < n; start += TILE) {
    const std::size_t run = n - start < TILE ? n - start : TILE;
    load_tile(static_cast<const char*>(source) + start * size_of(dtype), dtype, run, narrow);
    for (std::size_t i = 0; i < run; ++i) tile[start + i] = narrow[i];
  }
}

void store_tile(const float* tile, std::size_t n, DType dtype, void* target) {
  auto* bytes = static_cast<std::uint8_t*>(target);
  auto* halves = static_cast<unaligned_u16*>(target);
  switch (dtype) {
    case DType::f64:
      for (std::size_t i = 0; i < n; ++i) static_cast<unaligned_f64*>(target)[i] = tile[i];
      return;
    case DType::f32: std::memcpy(target, tile, n * 4); return;
    case DType::f16: store_f16(tile, n, halves); return;
    case DType::bf16:
      for (std::size_t i = 0; i < n; ++i) halves[i] = to_bf16(tile[i]);
      return;
    case DType::f8_e4m3fn:
      for (std::size_t i = 0; i < n; ++i) bytes[i] = to_e4m3fn(tile[i]);
      return;
    case DType::f8_e5m2:
      for (std::size_t i = 0; i < n; ++i) bytes[i] = to_e5m2(tile[i]);
      return;
  }
}

void store_tile(const double* tile, std::size_t n, DType dtype, void* target) {
  if (dtype == DType::f64) {
    std::memcpy(target, tile, n * 8);
    return;
  }
  alignas(64) float narrow[TILE];
  for (std::size_t start = 0; start < n; start += TILE) {
    const std::size_t run = n - start < TILE ? n - start : TILE;
    for (std::size_t i = 0; i < run; ++i)
      narrow[i] = dtype == DType::f32 ? static_cast<float>(tile[start + i]) : to_odd(tile[start + i]);
    store_tile(narrow, run, dtype, static_cast<char*>(target) + start * size_of(dtype));
  }
}

// Asks for the run of elements after this one, which most callers come to next: hardware follows a run to its end only.
static inline void fetch_next(const void* source, std::size_t bytes) {
  constexpr std::size_t LINE = 64;
  for (std::size_t at = 0; at < bytes; at += LINE) __builtin_prefetch(static_cast<const char*>(source) + bytes + at);
}

void task_vector_tile(const Source& base, const float* base_tile, const Source& expert, std::size_t start, std::size_t n,
                      float* tile) {
  if (base.dtype == DType::f64 || expert.dtype == DType::f64) {
    alignas(64) double left[TILE], right[TILE];
    load_tile(base.at(start), base.dtype, n, left);
    load_tile(expert.at(start), expert.dtype, n, right);
    for (std::size_t i = 0; i < n; ++i) tile[i] = static_cast<float>(right[i] - left[i]);
    return;
  }
  if (expert.dtype == DType::bf16) {  // the common case, without a round trip through the tile
    const auto* halves = static_cast<const unaligned_u16*>(expert.at(start));
    fetch_next(halves, 2 * n);
    for (std::size_t i = 0; i < n; ++i) tile[i] = float_of(static_cast<std::uint32_t>(halves[i]) << 16) - base_tile[i];
    return;
  }
  load_tile(expert.at(start), expert.dtype, n, tile);
  for (std::size_t i = 0; i < n; ++i) tile[i] -= base_tile[i];
}

void task_vector_tile(const Source& base, const Source& expert, std::size_t start, std::size_t n, float* tile) {
  if (!base) {
    load_tile(expert.at(start), expert.dtype, n, tile);
    return;
  }
  if (base.dtype == DType::bf16 && expert.dtype == DType::bf16) {
    const auto *left = static_cast<const unaligned_u16*>(base.at(start)), *right = static_cast<const unaligned_u16*>(expert.at(start));
    fetch_next(left, 2 * n);
    fetch_next(right, 2 * n);
    for (std::size_t i = 0; i < n; ++i)
      tile[i] = float_of(static_cast<std::uint32_t>(right[i]) << 16) - float_of(static_cast<std::uint32_t>(left[i]) << 16);
    return;
  }
  alignas(64) float base_tile[TILE];
  load_tile(base.at(start), base.dtype, n, base_tile);
  task_vector_tile(base, base_tile, expert, start, n, tile);
}

void store_sum_tile(const Source& base, const float* base_tile, float* total, std::size_t start, std::size_t n, const Target& out) {
  if (base.dtype == DType::f64) {
    alignas(64) double exact[TILE];
    load_tile(base.at(start), base.dtype, n, exact);
    for (std::size_t i = 0; i < n; ++i) exact[i] += total[i];
    store_tile(exact, n, out.dtype, out.at(start));
    return;
  }
  for (std::size_t i = 0; i < n; ++i) total[i] += base_tile[i];
  store_tile(total, n, out.dtype, out.at(start));
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
