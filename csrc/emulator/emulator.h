// The CUDA emulator: the same .cu source, compiled by a C++ compiler, run with one fiber per CUDA thread.
//
// This header gives kernels the CUDA names (threadIdx, __syncthreads, shuffles, votes, atomics) and gives
// common/device.cuh and common/launch.cuh what they need instead of PTX and the CUDA runtime. One block runs at a time,
// its threads take turns at barriers and warp collectives, in an order that tests choose. What it finds: races (with
// ThreadSanitizer), accesses out of bounds (with AddressSanitizer), reads of shared memory that nobody wrote or of
// cp.async data not waited for (both are NaN), divergent collectives, misaligned vector accesses, deadlocks, more static
// and dynamic shared memory than a launch may have.
// What it does not model: races between blocks, spin waits across the grid, the rounding inside a tensor core.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

struct Fiber;

struct Thread {  // what a running CUDA thread knows of itself
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int linear, lane, warp;
  Fiber* fiber;
};
extern Thread* current;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// function: the kernel, by which allow_shared has been called for it or not.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            const void* function = nullptr);
void allow_shared(const void* function);  // more than 48 KiB of shared memory: cudaFuncSetAttribute

// Barriers and collectives. `kind` names the operation in errors.
enum class Reduce { any, all, count };
void block_barrier(const char* where);
int block_barrier_reduce(int predicate, Reduce reduce);
void warp_barrier(uint32_t mask);
uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* kind);
uint32_t ballot(uint32_t mask, int predicate);

// Memory.
void* dynamic_shared();
size_t static_shared(size_t bytes);        // an offset, made once for each declaration
char* use_static_shared(size_t offset);  // its memory, which counts as the running kernel's
void check_aligned(const void* pointer, size_t bytes, const char* what);
void count_global(const void* pointer, size_t bytes, bool store);
void cp_async(void* shared, const void* global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups_left);

// Tensor-core operations. Fragments are laid out as the PTX manual says.
void ldmatrix(uint32_t* fragments, const void* row, int count, bool transposed);
enum class Element { f16, bf16 };
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element element);
float to_tf32(float value);
void mma_m16n8k8(float* d, const float* a, const float* b);  // an operand that is no tf32 number is an error

template <class T>
T shuffle_value(uint32_t mask, T value, int source, const char* kind) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, kind);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// Blocks run one after another and threads switch only inside the emulator, so a plain update is atomic; the __atomic
// builtins tell ThreadSanitizer that it is meant to be.
template <class T, class Update>
T atomic_update(T* p, Update update) {
  T old, fresh;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  fresh = update(old);
  __atomic_store(p, &fresh, __ATOMIC_RELAXED);
  return old;
}

}  // namespace emulator

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_dim)
#define gridDim (::emulator::current->grid_dim)

#define DNL_EMULATOR_TEXT_(x) #x
#define DNL_EMULATOR_TEXT(x) DNL_EMULATOR_TEXT_(x)
#define __syncthreads() ::emulator::block_barrier(__FILE__ ":" DNL_EMULATOR_TEXT(__LINE__))
inline int __syncthreads_or(int p) { return emulator::block_barrier_reduce(p, emulator::Reduce::any); }
inline int __syncthreads_and(int p) { return emulator::block_barrier_reduce(p, emulator::Reduce::all); }
inline int __syncthreads_count(int p) { return emulator::block_barrier_reduce(p, emulator::Reduce::count); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::warp_barrier(mask); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int base = emulator::current->lane & ~(width - 1);
  return emulator::shuffle_value(mask, value, base | (source & (width - 1)), "shfl.idx");
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = emulator::current->lane, source = lane ^ bits;
  return emulator::shuffle_value(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, "shfl.bfly");
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32) {
  const int lane = emulator::current->lane, source = lane + delta;
  return emulator::shuffle_value(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, "shfl.down");
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32) {
  const int lane = emulator::current->lane, source = lane - delta;
  return emulator::shuffle_value(mask, value, source < (lane & ~(width - 1)) ? lane : source, "shfl.up");
}
inline uint32_t __ballot_sync(uint32_t mask, int p) { return emulator::ballot(mask, p); }
inline int __any_sync(uint32_t mask, int p) { return emulator::ballot(mask, p) != 0; }
inline int __all_sync(uint32_t mask, int p) { return emulator::ballot(mask, p) == mask; }

template <class T, class U>
T atomicAdd(T* p, U v) {
  return emulator::atomic_update(p, [v](T old) { return static_cast<T>(old + static_cast<T>(v)); });
}
template <class T>
T atomicMax(T* p, T v) {
  return emulator::atomic_update(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return emulator::atomic_update(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return emulator::atomic_update(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline void __threadfence() {}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
