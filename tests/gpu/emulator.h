// CUDA C++ for g++: what csrc/cuda uses of it, on the machinery of emulator.cpp. No standard headers: they would take longer to
// compile than the kernels.
#pragma once

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() emulator_barrier(__LINE__)
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator_shared_memory)
#define SHARED_READ(address) emulator_access(address, sizeof *(address), false, false)
#define SHARED_WRITE(address) emulator_access(address, sizeof *(address), true, false)
#define SHARED_COUNT(address) emulator_count(address)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct Index {
  unsigned x, y, z;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

extern Index threadIdx, blockIdx, gridDim;
extern void* emulator_shared_memory;
void emulator_barrier(int line);
void emulator_access(const void* address, unsigned long bytes, bool write, bool atomic);

inline void emulator_count(unsigned* address) {
  emulator_access(address, sizeof *address, true, true);
  ++*address;
}
inline void atomicAdd(unsigned long long* address, unsigned long long value) { *address += value; }

template <class To, class From>
To emulator_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float fabsf(float value) { return __builtin_fabsf(value); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline int __float_as_int(float value) { return emulator_bits<int>(value); }
inline float __int_as_float(int bits) { return emulator_bits<float>(bits); }

inline float __double2float_rz(double value) {
  const float nearest = static_cast<float>(value);
  return __builtin_fabs(static_cast<double>(nearest)) > __builtin_fabs(value) ? __builtin_nextafterf(nearest, 0.0f) : nearest;
}

inline float float_of_half(unsigned short bits) { return static_cast<float>(emulator_bits<_Float16>(bits)); }
inline unsigned short half_of_float(float value) { return emulator_bits<unsigned short>(static_cast<_Float16>(value)); }

inline unsigned short bfloat16_of_float(float value) {
  const unsigned bits = emulator_bits<unsigned>(value);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A kernel of any signature, called with the addresses of its arguments (in braces, so that they are taken in order)
struct EmulatedCall {
  template <class... Arguments>
  EmulatedCall(void (*kernel)(Arguments...), Arguments... arguments) {
    kernel(arguments...);
  }
};
template <class... Arguments>
void emulator_call(void (*kernel)(Arguments...), void** arguments) {
  EmulatedCall{kernel, *static_cast<Arguments*>(*arguments++)...};
}
#define EMULATED(kernel) \
  extern "C" void emulated_##kernel(void** arguments) { emulator_call(kernel, arguments); }
