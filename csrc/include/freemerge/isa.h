// Every file of csrc/cpu is compiled once for each instruction set of this list (setup.py), into a namespace of that name;
// the set to run is chosen once, at run time. Elsewhere than on x86 there is one set: what the compiler targets by default.
#pragma once

#if defined(__x86_64__)
#define FREEMERGE_X86 1
#endif

namespace freemerge {

enum class Isa { portable, avx2, avx512 };

Isa isa();                 // the best this machine has, or what FREEMERGE_ISA asks for
const char* isa_name();

}  // namespace freemerge

#ifdef FREEMERGE_X86
// Declare an op in every namespace it is compiled into.
#define FREEMERGE_OP(result, name, ...)                          \
  namespace freemerge { namespace portable { result name(__VA_ARGS__); } \
  namespace avx2 { result name(__VA_ARGS__); }                   \
  namespace avx512 { result name(__VA_ARGS__); } }
// The version of an op to call on this machine.
#define FREEMERGE_BEST(name)                                     \
  (::freemerge::isa() == ::freemerge::Isa::avx512 ? &::freemerge::avx512::name \
   : ::freemerge::isa() == ::freemerge::Isa::avx2 ? &::freemerge::avx2::name   \
                                                  : &::freemerge::portable::name)
#else
#define FREEMERGE_OP(result, name, ...) \
  namespace freemerge { namespace portable { result name(__VA_ARGS__); } }
#define FREEMERGE_BEST(name) (&::freemerge::portable::name)
#endif
