// Storage types: a kernel is compiled for one of each kind (-DEXPERT=BF16 and so on). float8 is converted by the launcher.
#pragma once
#include "device.h"
#include "freemerge/simd.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// double to float by "round to odd": the rounding to a narrower type that follows is then as good as the only one
__device__ inline float to_odd(double value) {
  const float towards_zero = __double2float_rz(value);
  return static_cast<double>(towards_zero) == value ? towards_zero : __int_as_float(__float_as_int(towards_zero) | 1);
}

// at(data, i): element i as it is, in a type that holds it; put(data, i, value): one rounding to nearest even
struct F64 {
  typedef double Value;
  __device__ static double at(const void* data, long long i) { return static_cast<const double*>(data)[i]; }
  __device__ static void put(void* data, long long i, double value) { static_cast<double*>(data)[i] = value; }
};

struct F32 {
  typedef float Value;
  __device__ static float at(const void* data, long long i) { return static_cast<const float*>(data)[i]; }
  __device__ static void put(void* data, long long i, float value) { static_cast<float*>(data)[i] = value; }
  __device__ static void put(void* data, long long i, double value) { put(data, i, static_cast<float>(value)); }
};

struct F16 {
  typedef float Value;
  __device__ static float at(const void* data, long long i) { return float_of_half(static_cast<const unsigned short*>(data)[i]); }
  __device__ static void put(void* data, long long i, float value) { static_cast<unsigned short*>(data)[i] = half_of_float(value); }
  __device__ static void put(void* data, long long i, double value) { put(data, i, to_odd(value)); }
};

struct BF16 {
  typedef float Value;
  __device__ static float at(const void* data, long long i) {
    return __int_as_float(static_cast<int>(static_cast<const unsigned short*>(data)[i]) << 16);
  }
  __device__ static void put(void* data, long long i, float value) { static_cast<unsigned short*>(data)[i] = bfloat16_of_float(value); }
  __device__ static void put(void* data, long long i, double value) { put(data, i, to_odd(value)); }
};

// expert - base as float, formed in double where either is a double
template <class Expert, class Base>
__device__ inline float task_vector(Expert expert, Base base) { return static_cast<float>(expert - base); }

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
