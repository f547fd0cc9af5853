// The Python module dnl_kernels._C: facts about the build and the processor, and a digest of memory. Operators do not go
// through it; importing it runs the STABLE_TORCH_LIBRARY_IMPL blocks of the cpu.cpp files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"

namespace dnl {
namespace {

const char* const kNames[] = {"generic", "avx2", "avx512"};

bool runs(Isa level) {
#if defined(__x86_64__)
  if (level == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return level == Isa::generic;
}

// Those of this build that the processor can run, slowest first.
std::vector<std::string> levels() {
  std::vector<std::string> found;
  for (int level = 0; level < 3; level++)
    if ((DNL_LEVELS >> level & 1) && runs(static_cast<Isa>(level))) found.push_back(kNames[level]);
  return found;
}

std::atomic<int> current{-1};  // none, until the module chooses

void set_isa(const std::string& name) {
  std::string list;
  for (auto& level : levels()) {
    list += (list.empty() ? "" : ", ") + level;
    if (level == name) {
      current = static_cast<int>(std::find(kNames, kNames + 3, name) - kNames);
      return;
    }
  }
  throw std::invalid_argument("DNL_CPU_ISA is '" + name + "'; this processor and build have: " + list);
}

// A digest of pieces of memory: whole ones up to 4 KiB, eight bytes of every 256 of larger ones.
uint64_t digest(const std::vector<uintptr_t>& pointers, const std::vector<size_t>& sizes) {
  if (pointers.size() != sizes.size()) throw std::invalid_argument("digest: pointers and sizes of different numbers");
  uint64_t found = 0x9e3779b97f4a7c15u;
  const auto mix = [&found](uint64_t word) {
    found = (found ^ word) * 0xff51afd7ed558ccdu;
    found ^= found >> 32;
  };
  for (size_t i = 0; i < pointers.size(); i++) {
    const char* at = reinterpret_cast<const char*>(pointers[i]);
    const size_t step = sizes[i] <= 4096 ? 8 : 256;
    for (size_t offset = 0; offset < sizes[i]; offset += step) {
      uint64_t word = 0;
      std::memcpy(&word, at + offset, std::min<size_t>(8, sizes[i] - offset));
      mix(word);
    }
  }
  return found;
}

}  // namespace

Isa isa() { return static_cast<Isa>(current.load(std::memory_order_relaxed)); }

void no_level() { throw std::runtime_error("built for other processors (DNL_ISA_LEVELS at build time)"); }

}  // namespace dnl

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of dnl_kernels";
  if (dnl::levels().empty()) dnl::no_level();
  dnl::set_isa(dnl::levels().back());
  m.def("isa", [] { return dnl::kNames[static_cast<int>(dnl::isa())]; }, "instruction-set level in use");
  m.def("isa_levels", &dnl::levels, "levels that this processor can run, slowest first");
  m.def("set_isa", &dnl::set_isa, "choose a level (DNL_CPU_ISA at start, tests later)");
  m.def("digest", &dnl::digest, "of memory at addresses, of so many bytes");
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = "2.10";
}
