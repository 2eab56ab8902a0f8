// A histogram of one digit of the entries' keys (kernels/count_digits.py). A block counts in shared memory and adds what it has found
// to device memory at its end.
#include "element.h"

namespace freemerge {
namespace FREEMERGE_ISA {

constexpr int THREADS = 512, EACH = 8;   // entries of a thread whose loads are in flight together
constexpr unsigned SIGN = 0x80000000u, INFINITE = 0x7f800000u;

// 32 bits that are ordered like the numbers; of magnitudes, NaN counts as infinite
__device__ __forceinline__ unsigned key_of(float value, bool magnitude) {
  const unsigned bits = static_cast<unsigned>(__float_as_int(value)), size = bits & ~SIGN;
  if (magnitude) return (size < INFINITE ? size : INFINITE) | SIGN;
  return bits & SIGN ? ~bits : bits | SIGN;
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge

using namespace freemerge::FREEMERGE_ISA;

// base: [n] BASE, or null. counts: [2^width], added to. Counted are keys that begin as `found` does above the digit.
// Shared memory has `ways` counters of each digit, beside each other: lanes that meet the same one wait less for each other.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_digits(const void* base, const void* expert, long long n, unsigned found, int below, int width, int magnitudes, int ways,
                 unsigned long long* counts) {
  DYNAMIC_SHARED(unsigned, counters);
  const int bins = 1 << width;
  for (int i = threadIdx.x; i < bins * ways; i += THREADS) {
    SHARED_WRITE(counters + i);
    counters[i] = 0;
  }
  __syncthreads();

  const unsigned begin = found >> below >> width;   // in two steps: it may be 32 bits
  unsigned* mine = counters + threadIdx.x % ways;
  for (long long first = blockIdx.x * static_cast<long long>(THREADS * EACH); first < n;
       first += gridDim.x * static_cast<long long>(THREADS * EACH)) {
    EXPERT::Value end[EACH];
    BASE::Value start[EACH];
    FREEMERGE_UNROLL(8)
    for (int k = 0; k < EACH; ++k) {
      const long long i = first + k * THREADS + threadIdx.x;
      end[k] = i < n ? EXPERT::at(expert, i) : EXPERT::Value(0);
      start[k] = base && i < n ? BASE::at(base, i) : BASE::Value(0);
    }
    FREEMERGE_UNROLL(8)
    for (int k = 0; k < EACH; ++k) {
      const unsigned key = key_of(task_vector(end[k], start[k]), magnitudes);
      if (first + k * THREADS + threadIdx.x < n && key >> below >> width == begin)
        SHARED_COUNT(mine + (key >> below & (bins - 1)) * ways);
    }
  }
  __syncthreads();

  for (int bin = threadIdx.x; bin < bins; bin += THREADS) {
    unsigned long long total = 0;
    for (int i = bin * ways; i < (bin + 1) * ways; ++i) {
      SHARED_READ(counters + i);
      total += counters[i];
    }
    if (total) atomicAdd(counts + bin, total);
  }
}
