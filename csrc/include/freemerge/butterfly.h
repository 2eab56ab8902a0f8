// Transforms of a few points in registers: the butterflies fft.cpp makes long transforms of. Files of csrc/cpu only.
#pragma once
#include <cmath>

#include "freemerge/simd.h"

namespace freemerge {
namespace FREEMERGE_ISA {

struct Complex {
  Vec re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex minus_i_times(Complex a) { return {a.im, -a.re}; }

// a times the number stored at w
inline Complex times(Complex a, const float* w) {
  const Vec re = splat(w[0]), im = splat(w[1]);
  return {fnma(a.im, im, a.re * re), fma(a.im, re, a.re * im)};
}

// y[q] = sum_k x[k] exp(-2 pi i q k / RADIX), in place
template <int RADIX>
inline void butterfly(Complex* x);

template <>
inline void butterfly<2>(Complex* x) {
  const Complex sum = x[0] + x[1];
  x[1] = x[0] - x[1];
  x[0] = sum;
}

template <>
inline void butterfly<4>(Complex* x) {
  const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
  x[0] = a + c;
  x[2] = a - c;
  x[1] = {b.re + d.im, b.im - d.re};
  x[3] = {b.re - d.im, b.im + d.re};
}

template <>
inline void butterfly<8>(Complex* x) {
  const Vec half = splat(0.70710678118654752f);
  Complex even[4], odd[4];
  for (int k = 0; k < 4; ++k) even[k] = x[k] + x[k + 4], odd[k] = x[k] - x[k + 4];
  odd[1] = {(odd[1].re + odd[1].im) * half, (odd[1].im - odd[1].re) * half};
  odd[2] = {odd[2].im, -odd[2].re};
  odd[3] = {(odd[3].im - odd[3].re) * half, -(odd[3].re + odd[3].im) * half};
  butterfly<4>(even);
  butterfly<4>(odd);
  for (int k = 0; k < 4; ++k) x[2 * k] = even[k], x[2 * k + 1] = odd[k];
}

constexpr int LARGEST_RADIX = 61;

// An odd radix: x[k] and x[radix - k] enter by their sum and difference only, so the roots needed are radix/2 cosines and sines.
// roots: [radix] of (cos, sin) of 2 pi j / radix
template <int RADIX>
inline void odd_butterfly(Complex* x, const float* roots, int runtime_radix) {
  const int radix = RADIX ? RADIX : runtime_radix, half = radix / 2;
  Complex sums[RADIX ? RADIX / 2 : LARGEST_RADIX / 2], differences[RADIX ? RADIX / 2 : LARGEST_RADIX / 2];
  Complex first = x[0];
#pragma GCC unroll 6
  for (int k = 0; k < half; ++k) {
    sums[k] = x[k + 1] + x[radix - 1 - k];
    differences[k] = x[k + 1] - x[radix - 1 - k];
    first = first + sums[k];
  }
#pragma GCC unroll 6
  for (int q = 1; q <= half; ++q) {
    Complex even = x[0], odd{};
    int j = 0;
#pragma GCC unroll 6
    for (int k = 0; k < half; ++k) {
      j += q;
      if (j >= radix) j -= radix;
      const Vec cosine = splat(roots[2 * j]), sine = splat(roots[2 * j + 1]);
      even = {fma(sums[k].re, cosine, even.re), fma(sums[k].im, cosine, even.im)};
      odd = {fma(differences[k].re, sine, odd.re), fma(differences[k].im, sine, odd.im)};
    }
    x[q] = {even.re + odd.im, even.im - odd.re};
    x[radix - q] = {even.re - odd.im, even.im + odd.re};
  }
  x[0] = first;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
