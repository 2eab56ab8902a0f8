// Transforms of a few points in registers, of which csrc/cpu/fft.cpp and csrc/cuda/transform.h make long ones.
#pragma once
#include "freemerge/simd.h"

namespace freemerge {
namespace FREEMERGE_ISA {

struct Complex {
  Vec re, im;
};

FREEMERGE_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
FREEMERGE_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
FREEMERGE_INLINE Complex minus_i_times(Complex a) { return {a.im, -a.re}; }

FREEMERGE_INLINE Complex times(Complex a, Complex b) { return {fnma(a.im, b.im, a.re * b.re), fma(a.im, b.re, a.re * b.im)}; }

// a times the number stored at w
FREEMERGE_INLINE Complex times(Complex a, const float* w) { return times(a, Complex{splat(w[0]), splat(w[1])}); }

// y[q] = sum_k x[k] exp(-2 pi i q k / RADIX), in place
template <int RADIX>
FREEMERGE_INLINE void butterfly(Complex* x);

template <>
FREEMERGE_INLINE void butterfly<2>(Complex* x) {
  const Complex sum = x[0] + x[1];
  x[1] = x[0] - x[1];
  x[0] = sum;
}

template <>
FREEMERGE_INLINE void butterfly<4>(Complex* x) {
  const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
  x[0] = a + c;
  x[2] = a - c;
  x[1] = {b.re + d.im, b.im - d.re};
  x[3] = {b.re - d.im, b.im + d.re};
}

template <>
FREEMERGE_INLINE void butterfly<8>(Complex* x) {
  const Vec half = splat(0.70710678118654752f);
  Complex even[4], odd[4];
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < 4; ++k) even[k] = x[k] + x[k + 4], odd[k] = x[k] - x[k + 4];
  odd[1] = {(odd[1].re + odd[1].im) * half, (odd[1].im - odd[1].re) * half};
  odd[2] = {odd[2].im, -odd[2].re};
  odd[3] = {(odd[3].im - odd[3].re) * half, -(odd[3].re + odd[3].im) * half};
  butterfly<4>(even);
  butterfly<4>(odd);
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < 4; ++k) x[2 * k] = even[k], x[2 * k + 1] = odd[k];
}

// As 4 x 4: butterflies over points 4 apart, 16th roots of unity, butterflies over neighbours
template <>
FREEMERGE_INLINE void butterfly<16>(Complex* x) {
  const Complex w1{splat(0.92387953251128674f), splat(-0.38268343236508977f)};   // exp(-2 pi i / 16), its cube and its ninth power
  const Complex w3{splat(0.38268343236508977f), splat(-0.92387953251128674f)};
  const Complex w9{splat(-0.92387953251128674f), splat(0.38268343236508977f)};
  const Vec half = splat(0.70710678118654752f);
  Complex y[4][4];
  FREEMERGE_UNROLL(4)
  for (int j = 0; j < 4; ++j) {
    FREEMERGE_UNROLL(4)
    for (int k = 0; k < 4; ++k) y[j][k] = x[j + 4 * k];
    butterfly<4>(y[j]);
  }
  y[1][1] = times(y[1][1], w1);
  y[1][2] = {(y[1][2].re + y[1][2].im) * half, (y[1][2].im - y[1][2].re) * half};
  y[1][3] = times(y[1][3], w3);
  y[2][1] = {(y[2][1].re + y[2][1].im) * half, (y[2][1].im - y[2][1].re) * half};
  y[2][2] = minus_i_times(y[2][2]);
  y[2][3] = {(y[2][3].im - y[2][3].re) * half, -(y[2][3].re + y[2][3].im) * half};
  y[3][1] = times(y[3][1], w3);
  y[3][2] = {(y[3][2].im - y[3][2].re) * half, -(y[3][2].re + y[3][2].im) * half};
  y[3][3] = times(y[3][3], w9);
  FREEMERGE_UNROLL(4)
  for (int k = 0; k < 4; ++k) {
    Complex row[4] = {y[0][k], y[1][k], y[2][k], y[3][k]};
    butterfly<4>(row);
    FREEMERGE_UNROLL(4)
    for (int q = 0; q < 4; ++q) x[k + 4 * q] = row[q];
  }
}

constexpr int LARGEST_RADIX = 61;

struct InPlace {
  Complex* x;
  FREEMERGE_INLINE void operator()(int q, Complex y) const { x[q] = y; }
};

// An odd radix: x[k] and x[radix - k] enter by their sum and difference only, so the roots needed are radix/2 cosines and sines.
// roots: [radix] of (cos, sin) of 2 pi j / radix, a pointer or what is indexed like one
// put(q, y[q]): takes the results, y[0] last; it may overwrite x[q]
template <int RADIX, class Roots, class Put>
FREEMERGE_INLINE void odd_butterfly(const Complex* x, const Roots& roots, int runtime_radix, const Put& put) {
  const int radix = RADIX ? RADIX : runtime_radix, half = radix / 2;
  Complex sums[RADIX ? RADIX / 2 : LARGEST_RADIX / 2], differences[RADIX ? RADIX / 2 : LARGEST_RADIX / 2];
  Complex first = x[0];
  FREEMERGE_UNROLL(6)
  for (int k = 0; k < half; ++k) {
    sums[k] = x[k + 1] + x[radix - 1 - k];
    differences[k] = x[k + 1] - x[radix - 1 - k];
    first = first + sums[k];
  }
  FREEMERGE_UNROLL(6)
  for (int q = 1; q <= half; ++q) {
    Complex even = x[0], odd{};
    int j = 0;
    FREEMERGE_UNROLL(6)
    for (int k = 0; k < half; ++k) {
      j += q;
      if (j >= radix) j -= radix;
      const Vec cosine = splat(roots[2 * j]), sine = splat(roots[2 * j + 1]);
      even = {fma(sums[k].re, cosine, even.re), fma(sums[k].im, cosine, even.im)};
      odd = {fma(differences[k].re, sine, odd.re), fma(differences[k].im, sine, odd.im)};
    }
    put(q, Complex{even.re + odd.im, even.im - odd.re});
    put(radix - q, Complex{even.re - odd.im, even.im + odd.re});
  }
  put(0, first);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
