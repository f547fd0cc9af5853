// Shared memory, cp.async, ldmatrix with its bank conflicts, and the count of global traffic.
#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <set>
#include <unordered_map>

#include "emulator/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) __asan_poison_memory_region(p, n)
#define UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define POISON(p, n) (void)0
#define UNPOISON(p, n) (void)0
#endif

namespace emulator {

// What a block may have of static and dynamic memory together: without asking, and at most (of an H100).
constexpr size_t kUnasked = 48 << 10, kSharedLimit = 227 << 10;
constexpr size_t kSharedAlign = 1024, kGuard = 128;
constexpr int kNaN = 0xff;  // a byte of a NaN in every floating-point format

// ---- shared memory ----
alignas(kSharedAlign) static char static_space[256 << 10];  // for the arrays of all kernels
static size_t static_used = 0;
static char *raw = nullptr, *dynamic_space = nullptr;
static size_t dynamic_bytes = 0, static_bytes = 0, allowed_bytes = 0;  // of this launch

// A kernel has every array that one of its launches has used, as the compiler allocates them all. By index: offset / kGuard.
using Arrays = std::array<bool, sizeof static_space / kGuard>;
static size_t array_bytes[sizeof static_space / kGuard];
static Arrays used;  // by this kernel
static std::map<const void*, Arrays> used_by;
static const void* launched = nullptr;
static std::set<const void*> asked;

void allow_shared(const void* function) { asked.insert(function); }

static void check_limit() {
  if (static_bytes + dynamic_bytes > allowed_bytes)
    fail("%zu bytes of static and %zu of dynamic shared memory, of which a block may have %zu%s", static_bytes,
         dynamic_bytes, allowed_bytes, allowed_bytes == kUnasked ? " unless its kernel was allowed more" : "");
}

static EMULATOR_UNSEEN void fill_with_nan(char* begin, size_t bytes) {
  for (volatile char* p = begin; p < begin + bytes; p++) *p = static_cast<char>(kNaN);
}

size_t static_shared(size_t bytes) {
  const size_t offset = static_used;
  static_used = (offset + bytes + kGuard + kGuard - 1) / kGuard * kGuard;
  if (static_used > sizeof static_space) fail("static shared memory: more than %zu bytes", sizeof static_space);
  POISON(static_space + offset + bytes, static_used - offset - bytes);
  fill_with_nan(static_space + offset, bytes);
  array_bytes[offset / kGuard] = (bytes + 15) / 16 * 16;
  return offset;
}

char* use_static_shared(size_t offset) {
  bool& is_used = used[offset / kGuard];
  if (!is_used) {
    is_used = true;
    static_bytes += array_bytes[offset / kGuard];
    check_limit();
  }
  return static_space + offset;
}

void* dynamic_shared() { return dynamic_space; }

void allocate_shared(size_t bytes, const void* function) {
  launched = function;
  used = used_by[function];
  static_bytes = 0;
  for (size_t i = 0; i < used.size(); i++) static_bytes += used[i] ? array_bytes[i] : 0;
  dynamic_bytes = bytes;
  allowed_bytes = asked.count(function) ? kSharedLimit : kUnasked;
  check_limit();
  raw = static_cast<char*>(malloc(bytes + 2 * kSharedAlign));
  dynamic_space = raw + (kSharedAlign - reinterpret_cast<uintptr_t>(raw) % kSharedAlign) % kSharedAlign;
  POISON(dynamic_space + bytes, raw + bytes + 2 * kSharedAlign - (dynamic_space + bytes));
}

void fill_shared_with_nan() {
  fill_with_nan(dynamic_space, dynamic_bytes);
  fill_with_nan(static_space, static_used);
}

void free_shared() {
  if (launched) used_by[launched] = used;
  if (raw) UNPOISON(raw, dynamic_bytes + 2 * kSharedAlign);
  free(raw);
  raw = dynamic_space = nullptr;
}

bool is_shared(const void* pointer) {
  const char* p = static_cast<const char*>(pointer);
  return (p >= dynamic_space && p < dynamic_space + dynamic_bytes) || (p >= static_space && p < static_space + static_used);
}

// ---- global memory ----
constexpr uintptr_t kSector = 32;

// Traffic of one 32-byte sector. by_blocks: in how many blocks it was touched, each counted once: what reaches the
// second-level cache when a block's own reuse stays in registers, shared memory and the first level.
struct Sector {
  uint64_t bytes = 0, by_blocks = 0, last_block = ~0ull;
};
static std::unordered_map<uintptr_t, Sector> sectors[2];  // loads, stores

void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("%s of %zu bytes at misaligned %p", what, bytes, pointer);
}

EMULATOR_UNSEEN void count_global(const void* pointer, size_t bytes, bool store) {
  check_aligned(pointer, bytes, store ? "global store" : "global load");
  if (!options.trace) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Sector& sector = sectors[store][address / kSector];
  sector.bytes += bytes;
  if (sector.last_block != counts.blocks) sector.by_blocks++;
  sector.last_block = counts.blocks;
}

// ---- cp.async ----
struct Copy {
  void* to;
  char data[16];
  int bytes, group;
};
struct PendingCopies {
  std::deque<Copy> copies;
  int committed = 0;
};

PendingCopies* make_pending() { return new PendingCopies; }
void reset(PendingCopies* pending) { *pending = {}; }

void cp_async(void* shared, const void* global, int bytes, bool valid) {
  check_aligned(shared, bytes, "cp.async to shared memory");
  check_aligned(global, bytes, "cp.async from global memory");
  PendingCopies* pending = pending_of(current->fiber);
  Copy copy{shared, {}, bytes, pending->committed};
  if (valid) {
    count_global(global, bytes, false);
    seen_copy(copy.data, global, bytes, Seen::read);
  }
  const bool now = options.async_copy == AsyncCopy::at_issue ||
                   (options.async_copy == AsyncCopy::random && (random_bits() & 1));
  char nan[16];
  memset(nan, kNaN, sizeof nan);
  seen_copy(shared, now ? copy.data : nan, bytes, Seen::write);
  if (!now) pending->copies.push_back(copy);
}

void cp_async_commit() { pending_of(current->fiber)->committed++; }

void cp_async_wait(int groups_left) {
  PendingCopies* pending = pending_of(current->fiber);
  while (!pending->copies.empty() && pending->copies.front().group < pending->committed - groups_left) {
    const Copy& copy = pending->copies.front();
    seen_copy(copy.to, copy.data, copy.bytes, Seen::write);
    pending->copies.pop_front();
  }
}

// ---- ldmatrix ----
struct MatrixRow {  // one lane's part: the row whose address it gives, the fragments it gets
  uint16_t row[8];
  uintptr_t address;
  int count;
  bool transposed;
  uint32_t fragments[4];
};

static EMULATOR_UNSEEN void load_matrices(void** lanes, uint32_t mask) {
  if (mask != 0xffffffffu) fail("ldmatrix: mask %08x is not a full warp", mask);
  const MatrixRow& first = *static_cast<MatrixRow*>(lanes[0]);
  for (int i = 0; i < first.count; i++) {
    const MatrixRow* rows[8];
    int most = 0, of_banks[8] = {};  // rows per group of 4 banks; each row is 16 bytes
    for (int r = 0; r < 8; r++) {
      rows[r] = static_cast<MatrixRow*>(lanes[8 * i + r]);
      const int used = ++of_banks[rows[r]->address / 16 % 8];
      most = used > most ? used : most;
    }
    counts.ldmatrix++;
    counts.ldmatrix_conflicts += most - 1;
    for (int lane = 0; lane < 32; lane++) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = first.transposed ? rows[c]->row[r] : rows[r]->row[c];
      const uint32_t high = first.transposed ? rows[c + 1]->row[r] : rows[r]->row[c + 1];
      static_cast<MatrixRow*>(lanes[lane])->fragments[i] = low | high << 16;
    }
  }
}

void ldmatrix(uint32_t* fragments, const void* row, int count, bool transposed) {
  MatrixRow mine{{}, reinterpret_cast<uintptr_t>(row), count, transposed, {}};
  if (current->lane < 8 * count) {  // only these lanes' addresses are used
    check_aligned(row, 16, "ldmatrix: row");
    seen_copy(mine.row, row, 16, Seen::read);
  }
  collective(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", &mine, load_matrices);
  memcpy(fragments, mine.fragments, count * sizeof(uint32_t));
}

}  // namespace emulator

// Traffic of the bytes [begin, begin + bytes), loads then stores: requested bytes, bytes of the sectors that each block
// touched, bytes of the distinct sectors.
extern "C" __attribute__((visibility("default"))) void dnl_emulator_traffic(uintptr_t begin, uint64_t bytes,
                                                                            uint64_t out[6]) {
  using namespace emulator;
  for (int store = 0; store < 2; store++) {
    uint64_t* o = out + 3 * store;
    o[0] = o[1] = o[2] = 0;
    for (const auto& [index, sector] : sectors[store])
      if (index * kSector + kSector > begin && index * kSector < begin + bytes) {
        o[0] += sector.bytes;
        o[1] += sector.by_blocks * kSector;
        o[2] += kSector;
      }
  }
}

extern "C" __attribute__((visibility("default"))) void dnl_emulator_forget_traffic() {
  for (auto& map : emulator::sectors) map.clear();
}
