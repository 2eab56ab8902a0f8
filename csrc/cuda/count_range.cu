// A histogram of a range of the entries' keys (kernels/count_range.py). A block counts in shared memory, its threads count what lies
// outside in registers, and adds what it has found to device memory at its end.
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

// base: [n] BASE, or null. counts: [bins], of the keys from `low` on; outside: [2], of those below and above; both added to.
// Shared memory has `ways` counters of each bin, beside each other: lanes that meet the same one wait less for each other. After
// them it has two words for each thread.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_range(const void* base, const void* expert, long long n, unsigned low, int shift, int bins, int magnitudes, int ways,
                unsigned long long* counts, unsigned long long* outside) {
  DYNAMIC_SHARED(unsigned, counters);
  unsigned* edges = counters + bins * ways;
  for (int i = threadIdx.x; i < bins * ways; i += THREADS) {
    SHARED_WRITE(counters + i);
    counters[i] = 0;
  }
  __syncthreads();

  unsigned below = 0, above = 0;
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
      if (first + k * THREADS + threadIdx.x >= n) continue;
      const unsigned key = key_of(task_vector(end[k], start[k]), magnitudes), bin = (key - low) >> shift;
      if (key < low) ++below;
      else if (bin >= static_cast<unsigned>(bins)) ++above;
      else SHARED_COUNT(mine + bin * ways);
    }
  }
  for (int side = 0; side < 2; ++side) {
    SHARED_WRITE(edges + 2 * threadIdx.x + side);
    edges[2 * threadIdx.x + side] = side ? above : below;
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
  if (threadIdx.x < 32) {   // each adds up every 16th thread of one side
    unsigned long long total = 0;
    for (int i = threadIdx.x; i < 2 * THREADS; i += 32) {
      SHARED_READ(edges + i);
      total += edges[i];
    }
    if (total) atomicAdd(outside + threadIdx.x % 2, total);
  }
}
