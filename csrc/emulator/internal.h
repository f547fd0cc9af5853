// Shared by the emulator's own files; kernels do not see it.
#pragma once
#include "emulator/emulator.h"

// The runtime acts on behalf of CUDA threads: sanitizers look at it only where it says so (seen_copy).
#define EMULATOR_UNSEEN __attribute__((no_sanitize_address, no_sanitize_thread, no_sanitize_undefined))

namespace emulator {

enum class Order : int { in_order, reversed, random, warp_priority };
enum class AsyncCopy : int { at_issue, at_wait, random };

struct Options {
  Order order = Order::in_order;
  uint64_t seed = 1;
  AsyncCopy async_copy = AsyncCopy::random;
  bool trace = false;  // count global traffic by address
};
extern Options options;

struct Counts {  // since the last reset; read by tests in this order
  uint64_t switches, barriers, collectives, mma, ldmatrix, ldmatrix_conflicts, blocks, threads, launches, shared,
      shared_conflicts;
};
extern Counts counts;

uint64_t random_bits();

// A fiber: a stack of its own. switch_to runs it until it switches back; `entry` never returns.
struct Stack;
Stack* make_stack();
void prepare(Stack* stack, void (*entry)());
void switch_to(Stack* stack);
void switch_back(Stack* stack, bool for_good);
void entered_first_time();

// Happens-before edges for ThreadSanitizer; nothing otherwise.
void release(void* token);
void acquire(void* token);

// Copies for a CUDA thread, seen by the sanitizers as its own read of `from` and write of `to`.
enum class Seen { read, write };
void seen_copy(void* to, const void* from, size_t bytes, Seen seen);

// Pending cp.async copies of one thread.
struct PendingCopies;
PendingCopies* make_pending();
void reset(PendingCopies*);
PendingCopies* pending_of(Fiber*);

// Runs `run(arguments of all lanes, mask)` once every lane of `mask` has come; `ordered`: also a memory barrier.
using WarpFunction = void (*)(void** lane_arguments, uint32_t mask);
void collective(uint32_t mask, const char* kind, void* argument, WarpFunction run, bool ordered = false);

// Shared memory of a block: NaN at its start, with guard zones that AddressSanitizer knows.
void allocate_shared(size_t bytes, const void* function);
void fill_shared_with_nan();
void free_shared();
bool is_shared(const void* pointer);

// Bank conflicts of ordinary accesses, at the end of a block; only the flavour "banks" sees any.
#ifdef EMULATOR_BANKS
void finish_banks();
#else
inline void finish_banks() {}
#endif

}  // namespace emulator
