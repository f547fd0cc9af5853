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

}  // namespace dnl

#if defined(__x86_64__)
#define DNL_FOR_EACH_ISA(DECLARE) DECLARE(generic) DECLARE(avx2) DECLARE(avx512)
// dnl::<level in use>::call
#define DNL_ISA_CALL(call)                                   \
  switch (::dnl::isa()) {                                    \
    case ::dnl::Isa::avx512: ::dnl::avx512::call; break;     \
    case ::dnl::Isa::avx2: ::dnl::avx2::call; break;         \
    case ::dnl::Isa::generic: ::dnl::generic::call; break;   \
  }
#else
#define DNL_FOR_EACH_ISA(DECLARE) DECLARE(generic)
#define DNL_ISA_CALL(call) ::dnl::generic::call
#endif
