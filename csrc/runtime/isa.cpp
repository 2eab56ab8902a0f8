#include "freemerge/isa.h"

#include <cstdlib>
#include <cstring>

namespace freemerge {

static Isa best() {
#ifdef FREEMERGE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  // Every processor with AVX2 has FMA and F16C; a hypervisor may still hide one of them.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::portable;
}

static Isa chosen() {
  const Isa most = best();
  const char* wish = std::getenv("FREEMERGE_ISA");
  if (wish == nullptr) return most;
  if (std::strcmp(wish, "portable") == 0) return Isa::portable;
  if (std::strcmp(wish, "avx2") == 0 && most >= Isa::avx2) return Isa::avx2;
  return most;  // `freemerge info` shows what was made of the wish
}

Isa isa() {
  static const Isa once = chosen();
  return once;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace freemerge
