// Bank conflicts of ordinary accesses to shared memory, in the flavour "banks": kernels are compiled with
// -fsanitize=thread and linked with the functions below in place of ThreadSanitizer's, so that the compiler calls
// them for every access, and no kernel says anything about it.
//
// The accesses of one instruction (the place that calls, and how often a lane has come there) by the lanes of a warp count
// as one: exact where lanes come to it equally often, else an estimate; a vector type that the C++ compiler takes apart
// counts as its parts. A warp moves 32 words of 4 bytes at a time: 16
// lanes of 8 bytes, 8 of 16. Conflicts: how many more times than that, because different words lie in one of 32 banks.
#ifdef EMULATOR_BANKS
#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>

#include "emulator/internal.h"

namespace emulator {

struct Instruction {
  uintptr_t address[32];
  uint32_t mask = 0;
};
using Key = std::tuple<int, uintptr_t, uint64_t, size_t>;  // warp, place, how often, bytes
static std::map<Key, Instruction> pending;
static std::unordered_map<uintptr_t, uint64_t> visits[1024];  // of each thread of the block

static void finish(const Instruction& instruction, size_t bytes) {
  const int together = bytes <= 4 ? 32 : 128 / static_cast<int>(bytes);
  for (int first = 0; first < 32; first += together) {
    uintptr_t words[32 * 4];
    int count = 0, most = 0, in_bank[32] = {};
    for (int lane = first; lane < first + together; lane++)
      if (instruction.mask >> lane & 1)
        for (size_t b = 0; b < std::max<size_t>(bytes, 4); b += 4) words[count++] = (instruction.address[lane] + b) / 4;
    if (!count) continue;
    std::sort(words, words + count);
    for (int i = 0; i < count; i++)
      if (!i || words[i] != words[i - 1]) most = std::max(most, ++in_bank[words[i] % 32]);
    counts.shared++;
    counts.shared_conflicts += most - 1;
  }
}

static void access(const void* pointer, size_t bytes, void* place) {
  if (!current || !is_shared(pointer)) return;
  const Thread& t = *current;
  const uint64_t visit = visits[t.linear][reinterpret_cast<uintptr_t>(place)]++;
  const auto at = pending.try_emplace({t.warp, reinterpret_cast<uintptr_t>(place), visit, bytes}).first;
  at->second.address[t.lane] = reinterpret_cast<uintptr_t>(pointer);
  at->second.mask |= 1u << t.lane;
  if (at->second.mask != 0xffffffffu) return;
  finish(at->second, bytes);
  pending.erase(at);
}

void finish_banks() {
  for (const auto& [key, instruction] : pending) finish(instruction, std::get<3>(key));
  pending.clear();
  for (auto& of_thread : visits) of_thread.clear();
}

}  // namespace emulator

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, unsigned long n) { emulator::access(p, n, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { emulator::access(p, n, __builtin_return_address(0)); }
#define DNL_ACCESS(bytes)                                                                       \
  void __tsan_read##bytes(void* p) { emulator::access(p, bytes, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { emulator::access(p, bytes, __builtin_return_address(0)); }
DNL_ACCESS(1)
DNL_ACCESS(2)
DNL_ACCESS(4)
DNL_ACCESS(8)
DNL_ACCESS(16)
#define DNL_ATOMIC(bits, type)                                                                                    \
  type __tsan_atomic##bits##_load(const volatile type* p, int) { return *p; }                                     \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) { *p = v; }                                     \
  type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) { return __atomic_exchange_n(p, v, 5); }     \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) { return __atomic_fetch_add(p, v, 5); }     \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) { return __atomic_fetch_sub(p, v, 5); }     \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* e, type v, int, int) {                \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                                     \
  }
DNL_ATOMIC(8, uint8_t)
DNL_ATOMIC(32, uint32_t)
DNL_ATOMIC(64, uint64_t)
}
#endif
