// The high-pass filter's sweeps over the lines (here rows of N elements), one block for two of them: line a in the real part, line b
// in the imaginary part of one transform. Sweep in forms the sum of the task vectors as it loads, transforms, and keeps what the
// mask leaves: columns kept as they are, and the two lines' own coefficients of the columns the mask cuts, which are filtered
// across the lines (high_pass_across.cu) before sweep out puts both back, inverts, adds the base, rounds and stores.
#include "transform.h"
#include "element.h"

namespace freemerge {
namespace FREEMERGE_ISA {

struct TaskVectorSum {
  const void* base;                      // [lines][N] BASE, or null: the experts are task vectors
  const unsigned long long* experts;     // [T] addresses of [lines][N] EXPERT
  const float* weights;                  // [T]
  int T;
  long long line;                        // the first of the pair
  bool pair;                             // whether there is a second one

  __device__ __forceinline__ BASE::Value base_at(long long at) const { return base ? BASE::at(base, at) : BASE::Value(0); }

  // x[k] = sum_t weights[t] * (experts[t] - base) at point j + k * stride of both lines
  __device__ __forceinline__ void operator()(Complex* x, int j) const {
    constexpr int RADIX = radix_of(0), STRIDE = stride_of(0);
    constexpr bool HELD = RADIX <= 16;   // registers hold the base; else it is read again, from the cache, for each expert
    const long long at = line * N + j, next = pair ? N : 0;   // without a second line the first is read twice, and left out
    BASE::Value start[2][HELD ? RADIX : 1];
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) {
      if (HELD) start[0][k] = base_at(at + k * STRIDE), start[1][k] = base_at(at + next + k * STRIDE);
      x[k] = {0, 0};
    }
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      const void* expert = reinterpret_cast<const void*>(experts[t]);
      const float weight = weights[t];
      FREEMERGE_UNROLL(61)
      for (int k = 0; k < RADIX; ++k) {
        const BASE::Value a = HELD ? start[0][k] : base_at(at + k * STRIDE), b = HELD ? start[1][k] : base_at(at + next + k * STRIDE);
        x[k].re += weight * task_vector(EXPERT::at(expert, at + k * STRIDE), a);
        x[k].im += weight * task_vector(EXPERT::at(expert, at + next + k * STRIDE), b);
      }
    }
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < RADIX; ++k) x[k].im = pair ? x[k].im : 0;
  }
};

// out = round(base + scale * value)
struct Writer {
  const void* base;   // or null
  void* out;
  float scale;
  long long line;
  bool pair;

  __device__ __forceinline__ void put(long long at, float value) const {
    if (base)
      OUT::put(out, at, BASE::at(base, at) + scale * value);
    else
      OUT::put(out, at, scale * value);
  }

  __device__ __forceinline__ void operator()(const Complex* x, int j) const {
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < radix_of(0); ++k) {
      const long long at = line * N + j + k * stride_of(0);
      put(at, x[k].re);
      if (pair) put(at + N, x[k].im);
    }
  }
};

struct Magnitude {
  double* sum;   // of one thread
  bool pair;

  __device__ __forceinline__ void operator()(const Complex* x, int) const {
    FREEMERGE_UNROLL(61)
    for (int k = 0; k < radix_of(0); ++k) {
      *sum += fabsf(x[k].re);
      if (pair) *sum += fabsf(x[k].im);
    }
  }
};

// Where the columns lie among the swizzled points of a transform
struct Columns {
  const int* kept;     // [kept_count]
  const int2* mixed;   // [mixed_count] of column v <= N / 2 and of N - v
  int kept_count, mixed_count;
};

// The kept columns of both lines at once, [pairs][kept_count]; of the mixed ones each line's own, [mixed_count][lines]
struct Stored {
  float2* kept;
  float2* mixed;
  long long lines;
};

// A(v) = (Z(v) + conj Z(-v)) / 2, B(v) = (Z(v) - conj Z(-v)) / 2i. The halves are left to the gain.
__device__ __forceinline__ void keep(Points points, const Columns& columns, const Stored& stored, long long line, bool pair) {
  float2* kept = stored.kept + line / 2 * columns.kept_count;
  for (int i = threadIdx.x; i < columns.kept_count; i += THREADS) {
    const Complex z = points.load(columns.kept[i]);
    kept[i] = make_float2(z.re, z.im);
  }
  for (int i = threadIdx.x; i < columns.mixed_count; i += THREADS) {
    const int2 place = columns.mixed[i];
    const Complex z = points.load(place.x), mirror = points.load(place.y);
    float2* target = stored.mixed + i * stored.lines + line;
    target[0] = make_float2(z.re + mirror.re, z.im - mirror.im);
    if (pair) target[1] = make_float2(z.im + mirror.im, mirror.re - z.re);
  }
}

__device__ __forceinline__ void restore(Points points, const Columns& columns, const Stored& stored, long long line, bool pair) {
  for (int i = threadIdx.x; i < (N + 15) / 16 * 16; i += THREADS) points.store(i, Complex{0, 0});
  __syncthreads();
  const float2* kept = stored.kept + line / 2 * columns.kept_count;
  for (int i = threadIdx.x; i < columns.kept_count; i += THREADS) points.store(columns.kept[i], Complex{kept[i].x, kept[i].y});
  for (int i = threadIdx.x; i < columns.mixed_count; i += THREADS) {
    const int2 place = columns.mixed[i];
    const float2* source = stored.mixed + i * stored.lines + line;
    const float2 a = source[0], b = pair ? source[1] : make_float2(0, 0);
    points.store(place.x, Complex{a.x - b.y, a.y + b.x});
    if (place.y != place.x) points.store(place.y, Complex{a.x + b.y, b.x - a.y});
  }
  __syncthreads();
}

// The last pass back leaves natural order, so what it reads is free for others only after all threads are done.
__device__ __forceinline__ double sum_of_block(double own, void* memory) {
  double* parts = static_cast<double*>(memory);
  __syncthreads();
  SHARED_WRITE(parts + threadIdx.x);
  parts[threadIdx.x] = own;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < THREADS; ++i) sum += parts[i];
  return sum;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge

using namespace freemerge::FREEMERGE_ISA;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    high_pass_sweep_in(const void* base, const unsigned long long* experts, const float* weights, int T, long long lines,
                       const float2* table, const int* kept_places, int kept_count, const int2* mixed_places, int mixed_count,
                       float2* kept, float2* mixed) {
  DYNAMIC_SHARED(float2, memory);
  const Points points{memory};
  const long long line = 2ll * blockIdx.x;
  const bool pair = line + 1 < lines;
  forward(points, table, TaskVectorSum{base, experts, weights, T, line, pair});
  keep(points, {kept_places, mixed_places, kept_count, mixed_count}, {kept, mixed, lines}, line, pair);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    high_pass_sweep_out(const float2* kept, const float2* mixed, long long lines, const float2* table, const int* kept_places,
                        int kept_count, const int2* mixed_places, int mixed_count, const void* base, float scale, void* out) {
  DYNAMIC_SHARED(float2, memory);
  const Points points{memory};
  const long long line = 2ll * blockIdx.x;
  const bool pair = line + 1 < lines;
  const Stored stored{const_cast<float2*>(kept), const_cast<float2*>(mixed), lines};
  restore(points, {kept_places, mixed_places, kept_count, mixed_count}, stored, line, pair);
  inverse(points, table, Writer{base, out, scale, line, pair});
}

// partials: [pairs], the sum of magnitudes of each pair of lines
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    high_pass_sweep_magnitudes(const float2* kept, const float2* mixed, long long lines, const float2* table, const int* kept_places,
                               int kept_count, const int2* mixed_places, int mixed_count, double scale, double* partials) {
  DYNAMIC_SHARED(float2, memory);
  const Points points{memory};
  const long long line = 2ll * blockIdx.x;
  const bool pair = line + 1 < lines;
  const Stored stored{const_cast<float2*>(kept), const_cast<float2*>(mixed), lines};
  restore(points, {kept_places, mixed_places, kept_count, mixed_count}, stored, line, pair);
  double own = 0;
  inverse(points, table, Magnitude{&own, pair});
  const double sum = sum_of_block(own, memory);
  if (threadIdx.x == 0) partials[blockIdx.x] = scale * sum;
}
