// What only a GPU has; tests/gpu/emulator.h stands in for it where there is none.
#pragma once
#if !defined(FREEMERGE_EMULATED)

#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
// Each access to shared memory is announced to the emulator, which looks for races and for reads of what nobody wrote.
#define SHARED_READ(address)
#define SHARED_WRITE(address)
#define SHARED_COUNT(address) atomicAdd(address, 1u)

__device__ inline float float_of_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline unsigned short half_of_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline unsigned short bfloat16_of_float(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#endif
