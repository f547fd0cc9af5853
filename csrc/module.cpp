// The Python module dnl_kernels._C: facts about the build and the processor. Operators do not go through it; importing
// it runs the STABLE_TORCH_LIBRARY_IMPL blocks of the cpu.cpp files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"

namespace dnl {
namespace {

const char* const kNames[] = {"generic", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::generic;
}

std::atomic<int> current{static_cast<int>(detect())};

std::vector<std::string> levels() {
  return {kNames, kNames + static_cast<int>(detect()) + 1};
}

void set_isa(const std::string& name) {
  auto available = levels();
  for (size_t i = 0; i < available.size(); i++)
    if (available[i] == name) {
      current = static_cast<int>(i);
      return;
    }
  std::string list;
  for (auto& level : available) list += (list.empty() ? "" : ", ") + level;
  throw std::invalid_argument("DNL_CPU_ISA is '" + name + "'; this processor and build have: " + list);
}

}  // namespace

Isa isa() { return static_cast<Isa>(current.load(std::memory_order_relaxed)); }

}  // namespace dnl

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of dnl_kernels";
  m.def("isa", [] { return dnl::kNames[static_cast<int>(dnl::isa())]; }, "instruction-set level in use");
  m.def("isa_levels", &dnl::levels, "levels that this processor can run, slowest first");
  m.def("set_isa", &dnl::set_isa, "choose a level (DNL_CPU_ISA at start, tests later)");
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = "2.13";
}
