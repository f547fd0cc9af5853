// Stacks and the switch between them, told to the sanitizers.
#include <sys/mman.h>

#include <cstdlib>

#include "emulator/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN(...) __VA_ARGS__
#else
#define WITH_ASAN(...)
#endif
#if defined(EMULATOR_TSAN)  // this library is not instrumented then, only the kernels are
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#define WITH_TSAN(...) __VA_ARGS__
#else
#define WITH_TSAN(...)
#endif

extern "C" void dnl_emulator_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(.text
.type dnl_emulator_switch,@function
dnl_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dnl_emulator_switch,.-dnl_emulator_switch
)");
constexpr int kSavedRegisters = 6;
#else
#error "the CUDA emulator's context switch is written for x86-64"
#endif

namespace emulator {

constexpr size_t kStackBytes = 128 << 10, kPage = 4096;

struct Stack {
  char* base;
  void* pointer;
  WITH_ASAN(void* fake = nullptr;)
  WITH_TSAN(void* fiber;)
};

static void* scheduler_pointer;
WITH_ASAN(static void* scheduler_fake; static const void* scheduler_stack; static size_t scheduler_bytes;)
WITH_TSAN(static void* scheduler_fiber;)

Stack* make_stack() {
  void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stack of a thread");
  mprotect(memory, kPage, PROT_NONE);
  Stack* stack = new Stack{};
  stack->base = static_cast<char*>(memory) + kPage;
  WITH_TSAN(stack->fiber = __tsan_create_fiber(0);)
  return stack;
}

void prepare(Stack* stack, void (*entry)()) {
  WITH_ASAN(__asan_unpoison_memory_region(stack->base, kStackBytes);)
  void** top = reinterpret_cast<void**>(stack->base + kStackBytes);
  *--top = nullptr;  // entry expects rsp % 16 == 8
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
  stack->pointer = top;
}

EMULATOR_UNSEEN void switch_to(Stack* stack) {
  // Flag 1: the switch itself orders nothing; only barriers do.
  WITH_TSAN(scheduler_fiber = __tsan_get_current_fiber(); __tsan_switch_to_fiber(stack->fiber, 1);)
  WITH_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake, stack->base, kStackBytes);)
  dnl_emulator_switch(&scheduler_pointer, stack->pointer);
  WITH_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);)
}

EMULATOR_UNSEEN void switch_back(Stack* stack, bool for_good) {
  WITH_TSAN(__tsan_switch_to_fiber(scheduler_fiber, 1);)
  WITH_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &stack->fake, scheduler_stack, scheduler_bytes);)
  dnl_emulator_switch(&stack->pointer, scheduler_pointer);
  WITH_ASAN(__sanitizer_finish_switch_fiber(stack->fake, &scheduler_stack, &scheduler_bytes);)
  (void)for_good;
}

EMULATOR_UNSEEN void entered_first_time() {
  WITH_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);)
}

void release(void* token) {
  WITH_TSAN(__tsan_release(token);)
  (void)token;
}

void acquire(void* token) {
  WITH_TSAN(__tsan_acquire(token);)
  (void)token;
}

EMULATOR_UNSEEN void seen_copy(void* to, const void* from, size_t bytes, Seen seen) {
  void* watched = seen == Seen::read ? const_cast<void*>(from) : to;
  WITH_ASAN(if (__asan_region_is_poisoned(watched, bytes)) memmove(to, from, bytes);)  // reports it
  WITH_TSAN(if (seen == Seen::read) __tsan_read_range(watched, bytes); else __tsan_write_range(watched, bytes);)
  for (size_t i = 0; i < bytes; i++) static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
  (void)watched;
}

}  // namespace emulator
