// Instruction-set levels. Every csrc/*/cpu_kernel*.cpp is compiled once per level with -DDNL_ISA=<level> and puts its
// functions into namespace dnl::<level>; cpu.cpp picks the level at run time.
//
// Rule that keeps this sound: a kernel file includes only its params.h, common/vec.h and C headers. A standard-library
// template instantiated there would be a weak symbol that the linker may share with files meant for older processors.
#pragma once
#include <cstdint>

namespace dnl {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

// The level in use: the best one of this processor, or DNL_CPU_ISA, or what tests chose through set_isa.
Isa isa();
[[noreturn]] void no_level();  // throws: this build has no level that the processor runs

}  // namespace dnl

// The levels of this build, one bit each as in Isa: all of the processor's family, or what the builder was told.
#if !defined(DNL_LEVELS) && defined(__x86_64__)
#define DNL_LEVELS 7
#elif !defined(DNL_LEVELS)
#define DNL_LEVELS 1
#endif

#if DNL_LEVELS & 1
#define DNL_IF_GENERIC(...) __VA_ARGS__
#else
#define DNL_IF_GENERIC(...)
#endif
#if DNL_LEVELS & 2
#define DNL_IF_AVX2(...) __VA_ARGS__
#else
#define DNL_IF_AVX2(...)
#endif
#if DNL_LEVELS & 4
#define DNL_IF_AVX512(...) __VA_ARGS__
#else
#define DNL_IF_AVX512(...)
#endif

#define DNL_FOR_EACH_ISA(DECLARE) \
  DNL_IF_GENERIC(DECLARE(generic)) DNL_IF_AVX2(DECLARE(avx2)) DNL_IF_AVX512(DECLARE(avx512))
// dnl::<level in use>::call
#define DNL_ISA_CALL(call)                                                 \
  switch (::dnl::isa()) {                                                  \
    DNL_IF_AVX512(case ::dnl::Isa::avx512: ::dnl::avx512::call; break;)    \
    DNL_IF_AVX2(case ::dnl::Isa::avx2: ::dnl::avx2::call; break;)          \
    DNL_IF_GENERIC(case ::dnl::Isa::generic: ::dnl::generic::call; break;) \
    default: ::dnl::no_level();                                            \
  }
