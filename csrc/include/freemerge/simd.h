// Vectors of floats as wide as the instruction set has them; on a GPU, where each thread is a lane, a single float.
#pragma once
#if defined(FREEMERGE_CUDA)   // csrc/cuda: NVRTC has no standard headers

#define FREEMERGE_INLINE __device__ __forceinline__
#define FREEMERGE_UNROLL(most) _Pragma("unroll")

namespace freemerge {
namespace FREEMERGE_ISA {

typedef float Vec;

FREEMERGE_INLINE Vec splat(float value) { return value; }
FREEMERGE_INLINE Vec fma(Vec a, Vec b, Vec c) { return __fmaf_rn(a, b, c); }
FREEMERGE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return __fmaf_rn(-a, b, c); }

}  // namespace FREEMERGE_ISA
}  // namespace freemerge

#else   // csrc/cpu

#include <cstdint>
#include <cstring>

#define FREEMERGE_INLINE inline
#define FREEMERGE_PRAGMA(text) _Pragma(#text)
#define FREEMERGE_UNROLL(most) FREEMERGE_PRAGMA(GCC unroll most)

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace freemerge {
namespace FREEMERGE_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef std::uint32_t VecBits __attribute__((vector_size(WIDTH * 4)));
typedef std::uint16_t VecHalves __attribute__((vector_size(WIDTH * 2)));

inline Vec load(const float* source) {
  Vec value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void store(float* target, Vec value) { std::memcpy(target, &value, sizeof value); }

inline Vec load_bf16(const void* source) {
  VecHalves halves;
  std::memcpy(&halves, source, sizeof halves);
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, VecBits) << 16);
}

// a * b + c and c - a * b in one rounding where the instruction set has that: elsewhere results differ in the last bit.
#if defined(__AVX512F__)
inline Vec splat(float value) { return _mm512_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
#elif defined(__FMA__)
inline Vec splat(float value) { return _mm256_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
inline Vec splat(float value) { return (Vec)vdupq_n_f32(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline Vec fnma(Vec a, Vec b, Vec c) { return (Vec)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
inline Vec splat(float value) { return Vec{value, value, value, value}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
#endif

// target[j][i] = source[i][j] for 8 x 8 floats; strides in floats
#if defined(__AVX__)
inline void transpose_8x8(const float* source, std::size_t source_stride, float* target, std::size_t target_stride) {
  __m256 rows[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(source + i * source_stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      quads[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
      quads[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}
#else
inline void transpose_8x8(const float* source, std::size_t source_stride, float* target, std::size_t target_stride) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) target[j * target_stride + i] = source[i * source_stride + j];
}
#endif

}  // namespace FREEMERGE_ISA
}  // namespace freemerge

#endif
