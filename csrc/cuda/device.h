// What a kernel says differently on a GPU and in the emulator of tests/gpu, which has a header of this name of its own.
#pragma once

#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
// Each access to shared memory is announced to the emulator, which looks for races and for places nobody wrote.
#define SHARED_READ(address)
#define SHARED_WRITE(address)
