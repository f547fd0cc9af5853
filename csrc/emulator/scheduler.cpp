// Blocks one after another; inside a block every CUDA thread is a fiber that runs until a barrier or a warp collective.
// An error inside a kernel is a C++ exception: it ends the launch, and the operator's caller sees it as a RuntimeError.
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/internal.h"

namespace emulator {

Thread* current = nullptr;
Options options;
Counts counts;

static uint64_t random_state = 1;
uint64_t random_bits() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
  Thread thread;
  Stack* stack = make_stack();
  PendingCopies* pending = make_pending();
  State state = State::done;
  const char* where = "";
  int predicate = 0;
};

PendingCopies* pending_of(Fiber* fiber) { return fiber->pending; }

constexpr int kMaxThreads = 1024;

class ReadyQueue {  // a thread is in it at most once; no heap, so ThreadSanitizer sees nothing
 public:
  void push(int thread) { items_[tail_++ % kSize] = thread; }
  int pop(unsigned index) {
    std::swap(at(0), at(index));
    return items_[head_++ % kSize];
  }
  int& at(unsigned index) { return items_[(head_ + index) % kSize]; }
  unsigned size() const { return tail_ - head_; }
  void clear() { head_ = tail_ = 0; }

 private:
  static constexpr unsigned kSize = 2 * kMaxThreads;
  int items_[kSize];
  unsigned head_ = 0, tail_ = 0;
};

struct Collective {
  bool open = false;
  uint32_t mask = 0, arrived = 0;
  const char* kind = "";
  void* arguments[32] = {};
};
constexpr int kOpenCollectives = 8;

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches
  int threads = 0, alive = 0, at_barrier = 0;
  ReadyQueue ready;
  struct Warp {
    Collective open[kOpenCollectives];
    long order_token;
  };
  std::vector<Warp> warps;
  uint64_t priority[kMaxThreads / 32];
  long barrier_token, block_token;
  const std::function<void()>* kernel = nullptr;
  const char* name = "";
  std::exception_ptr error;
};
static Block block;
static std::set<std::string> launched_names;

static std::string describe(const char* format, va_list arguments) {
  char text[512], place[160] = "";
  vsnprintf(text, sizeof text, format, arguments);
  if (current) {
    const Thread& t = *current;
    snprintf(place, sizeof place, "block (%u,%u,%u) thread (%u,%u,%u): ", t.block.x, t.block.y, t.block.z, t.thread.x,
             t.thread.y, t.thread.z);
  }
  return std::string("emulated kernel ") + block.name + ": " + place + text;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = describe(format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

static EMULATOR_UNSEEN void run(Fiber* fiber) {
  counts.switches++;
  current = &fiber->thread;
  switch_to(fiber->stack);
  current = nullptr;
}

static void wait_as(State state, const char* where) {
  Fiber* fiber = current->fiber;
  fiber->where = where;
  fiber->state = state;
  switch_back(fiber->stack, false);
}

static void open_barrier() {
  for (int i = 0; i < block.threads; i++)
    if (block.fibers[i]->state == State::at_barrier) {
      block.fibers[i]->state = State::ready;
      block.ready.push(i);
    }
  block.at_barrier = 0;
  counts.barriers++;
}

static EMULATOR_UNSEEN void thread_main() {
  entered_first_time();
  Fiber* fiber = current->fiber;
  acquire(&block.block_token);
  try {
    (*block.kernel)();
  } catch (...) {
    block.error = std::current_exception();
  }
  release(&block.block_token);
  fiber->state = State::done;
  block.alive--;
  if (block.alive && block.at_barrier == block.alive) open_barrier();  // threads that left count as arrived
  switch_back(fiber->stack, true);
}

// ---- barriers ----
void block_barrier(const char* where) {
  release(&block.barrier_token);
  if (++block.at_barrier == block.alive) {
    current->fiber->state = State::at_barrier;
    open_barrier();
    switch_back(current->fiber->stack, false);
  } else {
    wait_as(State::at_barrier, where);
  }
  acquire(&block.barrier_token);
}

int block_barrier_reduce(int predicate, Reduce reduce) {
  current->fiber->predicate = predicate;
  block_barrier("__syncthreads with a predicate");
  int count = 0;
  for (int i = 0; i < block.threads; i++) count += block.fibers[i]->predicate != 0;
  block_barrier("__syncthreads with a predicate");
  if (reduce == Reduce::any) return count > 0;
  return reduce == Reduce::all ? count == block.threads : count;
}

// ---- warp collectives ----
static Collective& join(uint32_t mask, const char* kind) {
  Block::Warp& warp = block.warps[current->warp];
  Collective* unused = nullptr;
  for (Collective& c : warp.open) {
    if (!c.open) {
      if (!unused) unused = &c;
    } else if (c.mask & mask) {
      if (c.mask != mask || strcmp(c.kind, kind))
        fail("%s with mask %08x meets a pending %s with mask %08x: the warp diverged", kind, mask, c.kind, c.mask);
      return c;
    }
  }
  for (int lane = 0; lane < 32; lane++)
    if ((mask >> lane & 1) && block.fibers[current->warp * 32 + lane]->state == State::done)
      fail("%s: lane %d of mask %08x has left the kernel", kind, lane, mask);
  if (!unused) fail("more than %d open collectives in one warp", kOpenCollectives);
  *unused = Collective{true, mask, 0, kind, {}};
  return *unused;
}

EMULATOR_UNSEEN void collective(uint32_t mask, const char* kind, void* argument, WarpFunction run_all, bool ordered) {
  Thread* thread = current;
  const int first = thread->warp * 32, in_warp = block.threads - first;
  if (in_warp < 32 && mask == 0xffffffffu) mask = (1u << in_warp) - 1;  // the last warp may be partial
  if (!(mask >> thread->lane & 1)) fail("%s: the calling lane is not in mask %08x", kind, mask);
  Collective& c = join(mask, kind);
  if (ordered) release(&block.warps[thread->warp].order_token);
  c.arrived |= 1u << thread->lane;
  c.arguments[thread->lane] = argument;
  if (c.arrived != mask) {
    wait_as(State::at_collective, kind);
  } else {
    counts.collectives++;
    if (run_all) run_all(c.arguments, mask);
    c.open = false;
    for (int lane = 0; lane < 32; lane++)
      if ((mask >> lane & 1) && lane != thread->lane) {
        block.fibers[first + lane]->state = State::ready;
        block.ready.push(first + lane);
      }
    if (options.order != Order::in_order) {  // otherwise the last one to come simply goes on
      block.ready.push(thread->linear);
      switch_back(thread->fiber->stack, false);
    }
  }
  if (ordered) acquire(&block.warps[thread->warp].order_token);
}

void warp_barrier(uint32_t mask) { collective(mask, "__syncwarp", nullptr, nullptr, true); }

struct Shuffled {
  uint64_t value, result;
  int source;
};

static EMULATOR_UNSEEN void exchange(void** lanes, uint32_t mask) {
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) {
      Shuffled& mine = *static_cast<Shuffled*>(lanes[lane]);
      if (!(mask >> mine.source & 1)) fail("shuffle: lane %d reads lane %d, not in mask %08x", lane, mine.source, mask);
      mine.result = static_cast<Shuffled*>(lanes[mine.source])->value;
    }
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* kind) {
  Shuffled mine{value, 0, source};
  collective(mask, kind, &mine, exchange);
  return mine.result;
}

struct Vote {
  int predicate;
  uint32_t result;
};

static EMULATOR_UNSEEN void vote(void** lanes, uint32_t mask) {
  uint32_t result = 0;
  for (int lane = 0; lane < 32; lane++)
    if ((mask >> lane & 1) && static_cast<Vote*>(lanes[lane])->predicate) result |= 1u << lane;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->result = result;
}

uint32_t ballot(uint32_t mask, int predicate) {
  Vote mine{predicate, 0};
  collective(mask, "vote", &mine, vote);
  return mine.result;
}

// ---- launch ----
static unsigned choose() {
  const unsigned ready = block.ready.size();
  if (options.order == Order::random) return random_bits() % ready;
  if (options.order == Order::reversed) return ready - 1;
  unsigned pick = 0;
  if (options.order == Order::warp_priority) {  // one warp runs as far ahead as barriers allow; priorities change at times
    if (random_bits() % 4096 == 0) block.priority[random_bits() % (kMaxThreads / 32)] = random_bits();
    for (unsigned i = 1; i < ready; i++)
      if (block.priority[block.ready.at(i) / 32] > block.priority[block.ready.at(pick) / 32]) pick = i;
  }
  return pick;
}

static void deadlock() {
  std::string waiting;
  int shown = 0;
  for (int i = 0; i < block.threads && shown < 4; i++)
    if (block.fibers[i]->state != State::done) {
      waiting += (shown++ ? "; thread " : "thread ") + std::to_string(i) + " waits at " + block.fibers[i]->where;
    }
  fail("deadlock, a barrier or collective that not all threads reach: %s", waiting.c_str());
}

static void run_block(uint64_t index, dim3 grid, dim3 dim) {
  fill_shared_with_nan();
  block.alive = block.threads;
  block.at_barrier = 0;
  block.ready.clear();
  for (Block::Warp& warp : block.warps) warp = {};
  for (uint64_t& p : block.priority) p = random_bits();
  counts.blocks++;
  counts.threads += block.threads;
  release(&block.block_token);
  for (int i = 0; i < block.threads; i++) {
    Fiber* fiber = block.fibers[i].get();
    const unsigned t = i, z = dim.x * dim.y;
    fiber->thread = {make_uint3(t % dim.x, t / dim.x % dim.y, t / z),
                     make_uint3(index % grid.x, index / grid.x % grid.y, index / (uint64_t(grid.x) * grid.y)),
                     dim, grid, i, i % 32, i / 32, fiber};
    fiber->state = State::ready;
    reset(fiber->pending);
    prepare(fiber->stack, thread_main);
    block.ready.push(i);
  }
  while (block.alive && !block.error) {
    if (!block.ready.size()) deadlock();
    run(block.fibers[block.ready.pop(choose())].get());
  }
  acquire(&block.block_token);
  finish_banks();
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

void launch(const char* name, dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& kernel,
            const void* function) {
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  block.name = name;
  block.kernel = &kernel;
  const uint64_t threads = uint64_t(dim.x) * dim.y * dim.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads) fail("%llu threads in a block", (unsigned long long)threads);
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  block.threads = static_cast<int>(threads);
  while (static_cast<int>(block.fibers.size()) < block.threads) block.fibers.emplace_back(new Fiber);
  block.warps.resize((threads + 31) / 32);
  random_state = options.seed * 0x9E3779B97F4A7C15ull | 1;
  counts.launches++;
  launched_names.insert(name);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; i++) order[i] = options.order == Order::reversed ? blocks - 1 - i : i;
  if (options.order == Order::random || options.order == Order::warp_priority)
    for (uint64_t i = blocks; i > 1; i--) std::swap(order[i - 1], order[random_bits() % i]);
  allocate_shared(shared_bytes, function);
  struct Free {
    ~Free() { free_shared(); }
  } at_the_end;
  for (uint64_t index : order) run_block(index, grid, dim);
}

}  // namespace emulator

// ---- what tests set and read ----
#define DNL_EMULATOR_API extern "C" __attribute__((visibility("default")))

DNL_EMULATOR_API void dnl_emulator_configure(int order, uint64_t seed, int async_copy, int trace) {
  emulator::options = {static_cast<emulator::Order>(order), seed, static_cast<emulator::AsyncCopy>(async_copy),
                       trace != 0};
}

// The names of the kernels launched since the last call, each once, with a space behind each.
DNL_EMULATOR_API const char* dnl_emulator_launched() {
  static std::string text;
  text.clear();
  for (const std::string& name : emulator::launched_names) text += name + " ";
  emulator::launched_names.clear();
  return text.c_str();
}

DNL_EMULATOR_API void dnl_emulator_counts(uint64_t out[11]) {
  static_assert(sizeof(emulator::Counts) == 11 * sizeof(uint64_t));
  memcpy(out, &emulator::counts, sizeof emulator::counts);
  emulator::counts = {};
}
