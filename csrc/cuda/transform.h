// The Fourier transform of N complex points by one block of threads, in place in shared memory. Compiled for one length:
//   N         points
//   RADICES   factors of N, comma-separated, at least two of them, the first and the last at most 16; 1 is allowed anywhere
//   THREADS   of a block; BLOCKS of them at least on a multiprocessor (for the compiler: how many registers there are)
// Forward is decimation in frequency (butterfly, then twiddles), inverse decimation in time (twiddles, then butterfly): neither
// permutes, frequency f comes out at point position(f) of kernels/cuda/_transform.py. The first pass forward takes its points
// from `load`, the last pass back gives them to `store`: both run over device memory, coalesced, straight from and to registers.
//
// Points are (real, imaginary) pairs of 8 bytes, 16 of which fill the 32 banks. The late passes go through them in strides of
// powers of two, all in one bank; so point i lies at i ^ (i / 16 % 16), with bit 3 turned over once more by bit 6 for the sake of
// radix 8. A run of 16 stays a permutation of itself, strides of 2 to 256 spread over all banks, and no memory is lost: 14336
// points twice on a multiprocessor leave 1 KiB. Where the last radix is odd, strides are odd as well, and points lie in order: the places of a butterfly then are one register and constants.
#pragma once
#include "device.h"
#include "freemerge/butterfly.h"

namespace freemerge {
namespace FREEMERGE_ISA {

template <int... FACTORS>
struct Count {
  static constexpr int value = sizeof...(FACTORS);
};
constexpr int PASSES = Count<RADICES>::value;

constexpr int radix_of(int pass) {
  constexpr int radices[] = {RADICES};
  return radices[pass];
}
// A pass works on blocks of block_size points with butterflies over points stride_of apart.
constexpr int block_size(int pass) { return pass == 0 ? N : block_size(pass - 1) / radix_of(pass - 1); }
constexpr int stride_of(int pass) { return block_size(pass) / radix_of(pass); }

// The table of kernels/cuda/_transform.py: for each pass roots exp(-2 pi i power j / block size), 0 <= j < stride, and that for
//   IN_PAIRS   all powers 1 ... radix - 1, two beside each other: [pairs][stride][2]
//   DOUBLED    the powers 1, 2, 4, ... only, where the table would not fit the caches: [powers][stride]
//   DIRECT     all powers, [radix - 1][stride], followed by the [radix] roots exp(2 pi i j / radix): a prime too large for registers
enum class Twiddles { NONE, IN_PAIRS, DOUBLED, DIRECT };

constexpr bool in_registers(int radix) { return radix <= LARGEST_RADIX; }

constexpr Twiddles twiddles_of(int pass) {
  if (!in_registers(radix_of(pass))) return Twiddles::DIRECT;
  if (radix_of(pass) == 1 || stride_of(pass) == 1) return Twiddles::NONE;
  return radix_of(pass) <= 16 && stride_of(pass) <= 512 ? Twiddles::IN_PAIRS : Twiddles::DOUBLED;
}

constexpr int twiddle_count(int pass) {   // rounded up to whole pairs
  const int radix = radix_of(pass), stride = stride_of(pass);
  switch (twiddles_of(pass)) {
    case Twiddles::NONE: return 0;
    case Twiddles::IN_PAIRS: return radix / 2 * 2 * stride;
    case Twiddles::DIRECT: return ((radix - 1) * stride + radix + 1) / 2 * 2;
    default: break;
  }
  int powers = 0;
  for (int power = 1; power < radix; power *= 2) ++powers;
  return (powers * stride + 1) / 2 * 2;
}

constexpr int twiddles_at(int pass) { return pass == 0 ? 0 : twiddles_at(pass - 1) + twiddle_count(pass - 1); }

constexpr int last_radix(int pass) { return radix_of(pass) > 1 || pass == 0 ? radix_of(pass) : last_radix(pass - 1); }
constexpr bool SWIZZLED = last_radix(PASSES - 1) % 2 == 0;   // as in kernels/cuda/_transform.py

constexpr int swizzled(int i) { return SWIZZLED ? i ^ (i >> 4 & 15) ^ (i >> 3 & 8) : i; }

constexpr bool power_of_two(int n) { return (n & (n - 1)) == 0; }

// Where point `start` + k * STRIDE of a butterfly lies; the cheaper forms hold where the addition carries into no bit that matters.
template <int STRIDE, int RADIX>
__device__ __forceinline__ int place(int start, int swizzled_start, int k) {
  if constexpr (STRIDE % 256 == 0 || !SWIZZLED)
    return swizzled_start + k * STRIDE;
  else if constexpr (power_of_two(STRIDE) && power_of_two(RADIX))
    return (swizzled_start ^ (swizzled(k * STRIDE) & 15)) + (k * STRIDE & ~15);
  else
    return swizzled(start + k * STRIDE);
}

struct Points {
  float2* memory;

  __device__ __forceinline__ Complex load(int place) const {
    SHARED_READ(memory + place);
    const float2 value = memory[place];
    return {value.x, value.y};
  }
  __device__ __forceinline__ void store(int place, Complex value) const {
    SHARED_WRITE(memory + place);
    memory[place] = make_float2(value.re, value.im);
  }
};

template <bool SWAP>
__device__ __forceinline__ Complex swapped(Complex a) {
  if constexpr (SWAP) return {a.im, a.re};
  return a;
}

// ---- butterflies in registers ----

// cos and sin of 2 pi j / RADIX as constants: unrolled code then holds them as immediate operands
template <int RADIX>
struct Roots {
  static constexpr double PI = 3.141592653589793238462643;
  float values[2 * RADIX];

  static constexpr double sine(double x) {   // |x| <= pi / 2
    double term = x, sum = x;
    for (int k = 1; k < 13; ++k) sum += term *= -x * x / (2 * k * (2 * k + 1));
    return sum;
  }
  static constexpr double sine_of_turns(int numerator, int denominator) {   // sin(2 pi numerator / denominator)
    const double turns = static_cast<double>(numerator) / denominator;
    if (turns <= 0.25) return sine(2 * PI * turns);
    if (turns <= 0.75) return sine(PI - 2 * PI * turns);
    return sine(2 * PI * turns - 2 * PI);
  }
  constexpr Roots() : values() {
    for (int j = 0; j < RADIX; ++j) {
      values[2 * j] = static_cast<float>(sine_of_turns((4 * j + RADIX) % (4 * RADIX), 4 * RADIX));
      values[2 * j + 1] = static_cast<float>(sine_of_turns(j, RADIX));
    }
  }
  __device__ __forceinline__ constexpr float operator[](int i) const { return values[i]; }
};

constexpr int even_part(int radix) { return radix % 2 ? 1 : 2 * even_part(radix / 2); }

template <int A, int B>
__device__ __forceinline__ void transform_as_product(Complex* x);

template <int RADIX>
__device__ __forceinline__ void transform_in_registers(Complex* x) {
  if constexpr (RADIX == 9) {
    transform_as_product<3, 3>(x);
  } else if constexpr (RADIX == 15) {
    transform_as_product<3, 5>(x);
  } else if constexpr (RADIX % 2 == 1 && RADIX > 1) {
    constexpr Roots<RADIX> roots;
    odd_butterfly<RADIX>(x, roots, RADIX, InPlace{x});
  } else if constexpr (even_part(RADIX) < RADIX) {
    transform_as_product<RADIX / even_part(RADIX), even_part(RADIX)>(x);
  } else if constexpr (RADIX > 1) {
    butterfly<RADIX>(x);
  }
}

// Butterflies over points B apart, roots of unity, butterflies over neighbours
template <int A, int B>
__device__ __forceinline__ void transform_as_product(Complex* x) {
  constexpr Roots<A * B> roots;
  Complex y[B][A];
  FREEMERGE_UNROLL(8)
  for (int b = 0; b < B; ++b) {
    FREEMERGE_UNROLL(8)
    for (int a = 0; a < A; ++a) y[b][a] = x[B * a + b];
    transform_in_registers<A>(y[b]);
    FREEMERGE_UNROLL(8)
    for (int q = 1; q < A; ++q)
      if (b > 0) y[b][q] = times(y[b][q], Complex{roots[2 * b * q], -roots[2 * b * q + 1]});
  }
  FREEMERGE_UNROLL(8)
  for (int q = 0; q < A; ++q) {
    Complex row[B];
    FREEMERGE_UNROLL(8)
    for (int b = 0; b < B; ++b) row[b] = y[b][q];
    transform_in_registers<B>(row);
    FREEMERGE_UNROLL(8)
    for (int p = 0; p < B; ++p) x[q + A * p] = row[p];
  }
}

// x[k] *= w^k for the j-th root w of the pass. What DOUBLED leaves out are products of at most log2(RADIX) roots, with an error
// of that many roundings.
template <int PASS>
__device__ __forceinline__ void twiddle(Complex* x, const float2* table, int j) {
  constexpr int RADIX = radix_of(PASS), STRIDE = stride_of(PASS);
  table += twiddles_at(PASS);
  if constexpr (twiddles_of(PASS) == Twiddles::IN_PAIRS) {
    FREEMERGE_UNROLL(8)
    for (int k = 1; k < RADIX; k += 2) {
      const float4 pair = reinterpret_cast<const float4*>(table)[k / 2 * STRIDE + j];
      x[k] = times(x[k], Complex{pair.x, pair.y});
      if (k + 1 < RADIX) x[k + 1] = times(x[k + 1], Complex{pair.z, pair.w});
    }
  } else if constexpr (twiddles_of(PASS) == Twiddles::DOUBLED) {
    Complex power[RADIX];
    int highest = 1, loaded = 0;
    FREEMERGE_UNROLL(61)
    for (int k = 1; k < RADIX; ++k) {
      if (k == 2 * highest) highest = k;
      if (k == highest) {
        const int at = loaded++ * STRIDE + j;
        power[k] = {table[at].x, table[at].y};
      } else {
        power[k] = times(power[highest], power[k - highest]);
      }
      x[k] = times(x[k], power[k]);
    }
  }
}

template <int PASS, bool INVERSE>
struct ToPoints {
  Points points;
  int start, swizzled_start;

  __device__ __forceinline__ void operator()(int q, Complex y) const {
    points.store(place<stride_of(PASS), radix_of(PASS)>(start, swizzled_start, q), swapped<INVERSE>(y));
  }
};

template <int PASS, bool INVERSE>
__device__ __forceinline__ void pass_in_registers(Points points, const float2* table) {
  constexpr int RADIX = radix_of(PASS), STRIDE = stride_of(PASS);
#pragma unroll 1
  for (int i = threadIdx.x; i < N / RADIX; i += THREADS) {
    const int j = i % STRIDE, start = i / STRIDE * (STRIDE * RADIX) + j, swizzled_start = swizzled(start);
    Complex x[RADIX];
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) x[k] = swapped<INVERSE>(points.load(place<STRIDE, RADIX>(start, swizzled_start, k)));
    const ToPoints<PASS, INVERSE> put{points, start, swizzled_start};
    if constexpr (RADIX > 16 && STRIDE == 1) {   // each result leaves at once: registers hold the inputs only
      constexpr Roots<RADIX> roots;
      odd_butterfly<RADIX>(x, roots, RADIX, put);
    } else {
      if (INVERSE) twiddle<PASS>(x, table, j);
      transform_in_registers<RADIX>(x);
      if (!INVERSE) twiddle<PASS>(x, table, j);
      FREEMERGE_UNROLL(61)
      for (int k = 0; k < RADIX; ++k) put(k, x[k]);
    }
  }
  __syncthreads();
}

// ---- a prime too large for registers: direct sums by all threads ----

template <int PASS, bool INVERSE>
__device__ __forceinline__ void twiddle_in_memory(Points points, const float2* table) {
  constexpr int RADIX = radix_of(PASS), STRIDE = stride_of(PASS), SIZE = RADIX * STRIDE;
  if (STRIDE == 1) return;
  for (int i = threadIdx.x; i < N; i += THREADS) {
    const int k = i % SIZE / STRIDE, j = i % STRIDE;
    if (k == 0) continue;
    const float2 root = table[twiddles_at(PASS) + (k - 1) * STRIDE + j];
    points.store(swizzled(i), swapped<INVERSE>(times(swapped<INVERSE>(points.load(swizzled(i))), Complex{root.x, root.y})));
  }
  __syncthreads();
}

// A thread makes outputs q and RADIX - q of one butterfly, GROUP butterflies at once; all of a group have read before one writes.
template <int PASS, bool INVERSE>
__device__ __forceinline__ void sums_in_memory(Points points, const float2* table) {
  constexpr int RADIX = radix_of(PASS), STRIDE = stride_of(PASS), PAIRS = RADIX / 2 + 1;
  static_assert(PAIRS <= THREADS, "a block has a thread for each pair of outputs of a butterfly");
  constexpr int GROUP = THREADS / PAIRS;
  const float2* roots = table + twiddles_at(PASS) + (RADIX - 1) * STRIDE;
  const int q = threadIdx.x / GROUP;
  for (int first = 0; first < N / RADIX; first += GROUP) {
    const int i = first + threadIdx.x % GROUP, start = i / STRIDE * (STRIDE * RADIX) + i % STRIDE;
    const bool works = q < PAIRS && i < N / RADIX;
    Complex even{0, 0}, odd{0, 0};
    if (works) {
      even = swapped<INVERSE>(points.load(swizzled(start)));
      for (int k = 1, j = q; k <= RADIX / 2; ++k, j = j + q < RADIX ? j + q : j + q - RADIX) {
        const Complex a = swapped<INVERSE>(points.load(swizzled(start + k * STRIDE)));
        const Complex b = swapped<INVERSE>(points.load(swizzled(start + (RADIX - k) * STRIDE)));
        const Complex sum = a + b, difference = a - b;
        const float2 root = roots[j];
        even = {fma(sum.re, root.x, even.re), fma(sum.im, root.x, even.im)};
        odd = {fma(difference.re, root.y, odd.re), fma(difference.im, root.y, odd.im)};
      }
    }
    __syncthreads();
    if (works) points.store(swizzled(start + q * STRIDE), swapped<INVERSE>(Complex{even.re + odd.im, even.im - odd.re}));
    if (works && q > 0) points.store(swizzled(start + (RADIX - q) * STRIDE), swapped<INVERSE>(Complex{even.re - odd.im, even.im + odd.re}));
  }
  __syncthreads();
}

// ---- all passes ----

// Passes PASS ... LAST - 1
template <int PASS, int LAST>
__device__ __forceinline__ void forward_passes(Points points, const float2* table) {
  if constexpr (PASS < LAST) {
    if constexpr (radix_of(PASS) == 1) {
    } else if constexpr (in_registers(radix_of(PASS))) {
      pass_in_registers<PASS, false>(points, table);
    } else {
      sums_in_memory<PASS, false>(points, table);
      twiddle_in_memory<PASS, false>(points, table);
    }
    forward_passes<PASS + 1, LAST>(points, table);
  }
}

// Passes PASS - 1 ... 1
template <int PASS>
__device__ __forceinline__ void inverse_passes(Points points, const float2* table) {
  if constexpr (PASS > 1) {
    if constexpr (radix_of(PASS - 1) == 1) {
    } else if constexpr (in_registers(radix_of(PASS - 1))) {
      pass_in_registers<PASS - 1, true>(points, table);
    } else {
      twiddle_in_memory<PASS - 1, true>(points, table);
      sums_in_memory<PASS - 1, true>(points, table);
    }
    inverse_passes<PASS - 1>(points, table);
  }
}

// load(x, j): x[k] = point j + k * stride_of(0), for k < radix_of(0)
template <class Load>
__device__ __forceinline__ void forward_first(Points points, const float2* table, const Load& load) {
  constexpr int RADIX = radix_of(0), STRIDE = stride_of(0);
#pragma unroll 1
  for (int j = threadIdx.x; j < STRIDE; j += THREADS) {
    Complex x[RADIX];
    load(x, j);
    transform_in_registers<RADIX>(x);
    twiddle<0>(x, table, j);
    const int swizzled_start = swizzled(j);
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) points.store(place<STRIDE, RADIX>(j, swizzled_start, k), x[k]);
  }
  __syncthreads();
}

// store(x, j): takes point j + k * stride_of(0) in x[k]
template <class Store>
__device__ __forceinline__ void inverse_last(Points points, const float2* table, const Store& store) {
  constexpr int RADIX = radix_of(0), STRIDE = stride_of(0);
#pragma unroll 1
  for (int j = threadIdx.x; j < STRIDE; j += THREADS) {
    Complex x[RADIX];
    const int swizzled_start = swizzled(j);
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) x[k] = swapped<true>(points.load(place<STRIDE, RADIX>(j, swizzled_start, k)));
    twiddle<0>(x, table, j);
    transform_in_registers<RADIX>(x);
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) x[k] = swapped<true>(x[k]);
    store(x, j);
  }
}

template <class Load>
__device__ __forceinline__ void forward(Points points, const float2* table, const Load& load) {
  forward_first(points, table, load);
  forward_passes<1, PASSES>(points, table);
}

template <class Store>
__device__ __forceinline__ void inverse(Points points, const float2* table, const Store& store) {
  inverse_passes<PASSES>(points, table);
  inverse_last(points, table, store);
}

// The frequency, in units of the passes before PASS, that comes out at point `at`, a multiple of the last radix
template <int PASS>
__device__ __forceinline__ int frequency_of(int at) {
  if constexpr (PASS == PASSES - 1)
    return 0;
  else
    return at / stride_of(PASS) + radix_of(PASS) * frequency_of<PASS + 1>(at % stride_of(PASS));
}

// The last pass forward, `multiply`, and the first pass back: butterflies over neighbours, whose points never leave the registers.
// multiply(x, frequency, step): x[k] is the coefficient of frequency + k * step
template <class Multiply>
__device__ __forceinline__ void turn(Points points, const Multiply& multiply) {
  constexpr int PASS = PASSES - 1, RADIX = radix_of(PASS);
#pragma unroll 1
  for (int i = threadIdx.x; i < N / RADIX; i += THREADS) {
    Complex x[RADIX];
    const int start = i * RADIX, swizzled_start = swizzled(start);
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) x[k] = points.load(place<1, RADIX>(start, swizzled_start, k));
    transform_in_registers<RADIX>(x);
    multiply(x, frequency_of<0>(start), N / RADIX);
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) x[k] = swapped<true>(x[k]);
    transform_in_registers<RADIX>(x);
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) points.store(place<1, RADIX>(start, swizzled_start, k), swapped<true>(x[k]));
  }
  __syncthreads();
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
