// What kernels use beyond CUDA C++ itself: memory accesses of a stated width, cp.async, ldmatrix, mma.sync, element
// types, reductions. Compiled by nvcc these are instructions; compiled for the emulator (csrc/emulator) they are calls.
// Inline PTX stands here and nowhere else.
#pragma once
#ifdef DNL_EMULATOR
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <cstdint>
#include <cstring>
#include <type_traits>

#define DNL_DEVICE __device__ __forceinline__
#ifdef __CUDACC__
#define DNL_EITHER __host__ __device__
#else
#define DNL_EITHER
#endif

// T name[count] in shared memory; T* name = the dynamic shared memory of the launch (16-byte aligned).
#ifdef DNL_EMULATOR
#define DNL_SHARED(T, name, count)                                                   \
  static const size_t name##_offset = ::emulator::static_shared(sizeof(T) * (count)); \
  T(&name)[count] = *reinterpret_cast<T(*)[count]>(::emulator::use_static_shared(name##_offset))
#define DNL_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::emulator::dynamic_shared())
#else
#define DNL_SHARED(T, name, count) __shared__ T name[count]
#define DNL_DYNAMIC_SHARED(T, name)                                  \
  extern __shared__ __align__(16) unsigned char dnl_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dnl_dynamic_shared)
#endif

namespace dnl {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;
constexpr unsigned kFullWarp = 0xffffffffu;

// ---- global memory: every access of a kernel goes through these three, so that the emulator can count it ----
template <class T>
DNL_DEVICE T load_global(const T* p) {
#ifdef DNL_EMULATOR
  emulator::count_global(p, sizeof(T), false);
  return *p;
#else
  return __ldg(p);  // read-only for the whole kernel
#endif
}
template <class T>
DNL_DEVICE T load_own(const T* p) {  // written by this thread in the same kernel
#ifdef DNL_EMULATOR
  emulator::count_global(p, sizeof(T), false);
#endif
  return *p;
}
template <class T>
DNL_DEVICE void store_global(T* p, T value) {
#ifdef DNL_EMULATOR
  emulator::count_global(p, sizeof(T), true);
#endif
  *p = value;
}

// ---- elements: memory holds T, arithmetic is float ----
DNL_DEVICE float to_float(float v) { return v; }
DNL_DEVICE float to_float(half_t v) { return __half2float(v); }
DNL_DEVICE float to_float(bfloat16_t v) { return __bfloat162float(v); }
template <class T>
DNL_DEVICE T from_float(float v) {
  if constexpr (std::is_same_v<T, half_t>) return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, bfloat16_t>) return __float2bfloat16_rn(v);
  else return v;
}

// Two half-type elements in a 32-bit register, the first one in the low bits.
template <class T>
DNL_DEVICE uint32_t pack(float low, float high) {
  uint16_t bits[2];
  const T values[2] = {from_float<T>(low), from_float<T>(high)};
  memcpy(bits, values, sizeof bits);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}
template <class T>
DNL_DEVICE float2 unpack(uint32_t pair) {
  T values[2];
  memcpy(static_cast<void*>(values), &pair, sizeof values);
  return make_float2(to_float(values[0]), to_float(values[1]));
}

// N consecutive elements, moved by one access of N * sizeof(T) <= 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int kBytes = N * sizeof(T);
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2,
               std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  T values[N];
};
template <class T, int N>
DNL_DEVICE Pack<T, N> load_pack(const T* p) {
  const auto word = load_global(reinterpret_cast<const typename Pack<T, N>::Word*>(p));
  Pack<T, N> pack;
  memcpy(&pack, &word, sizeof pack);
  return pack;
}
template <class T, int N>
DNL_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  typename Pack<T, N>::Word word;
  memcpy(&word, &pack, sizeof word);
  store_global(reinterpret_cast<typename Pack<T, N>::Word*>(p), word);
}

// ---- reductions ----
DNL_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// ---- asynchronous copies: 16 bytes from global to shared memory, zeros where not `valid` ----
DNL_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
#ifdef DNL_EMULATOR
  emulator::cp_async(shared, global, 16, valid);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}
DNL_DEVICE void cp_async_commit() {
#ifdef DNL_EMULATOR
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroupsLeft>
DNL_DEVICE void cp_async_wait() {
#ifdef DNL_EMULATOR
  emulator::cp_async_wait(kGroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// ---- ldmatrix: kCount 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i. Lane l gets
// elements (l / 4, 2 (l % 4)) and the next one of each matrix, of its transpose with kTransposed ----
template <int kCount, bool kTransposed = false>
DNL_DEVICE void ldmatrix(uint32_t (&fragments)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef DNL_EMULATOR
  emulator::ldmatrix(fragments, row, kCount, kTransposed);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define DNL_LDMATRIX(count, registers, source, ...)                                                          \
  if constexpr (kTransposed)                                                                                \
    asm volatile("ldmatrix.sync.aligned.m8n8." count ".trans.shared.b16 {" registers "}, [" source "];"       \
                 : __VA_ARGS__ : "r"(address) : "memory");                                                  \
  else                                                                                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8." count ".shared.b16 {" registers "}, [" source "];"             \
                 : __VA_ARGS__ : "r"(address) : "memory")
  if constexpr (kCount == 1) {
    DNL_LDMATRIX("x1", "%0", "%1", "=r"(fragments[0]));
  } else if constexpr (kCount == 2) {
    DNL_LDMATRIX("x2", "%0,%1", "%2", "=r"(fragments[0]), "=r"(fragments[1]));
  } else {
    DNL_LDMATRIX("x4", "%0,%1,%2,%3", "%4", "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]),
                 "=r"(fragments[3]));
  }
#undef DNL_LDMATRIX
#endif
}

// ---- d += a b on a tensor core: a is 16x16, b 16x8, d 16x8 in float. Lane l, g = l / 4, t = 2 (l % 4): a holds rows g
// and g + 8 at columns t, t+1, t+8, t+9 (order: g t, g+8 t, g t+8, g+8 t+8), b rows t, t+1 and t+8, t+9 of column g,
// d (g, t), (g, t+1), (g+8, t), (g+8, t+1) ----
template <class T>
DNL_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef DNL_EMULATOR
  const uint32_t b[2] = {b0, b1};
  emulator::mma_m16n8k16(d, a, b,
                         std::is_same_v<T, bfloat16_t> ? emulator::Element::bf16 : emulator::Element::f16);
#else
#define DNL_MMA(type)                                                                                         \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "     \
               "{%8,%9}, {%0,%1,%2,%3};"                                                                      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bfloat16_t>)
    DNL_MMA("bf16");
  else
    DNL_MMA("f16");
#undef DNL_MMA
#endif
}

// ---- tf32: a float with 10 bits of mantissa, rounded to nearest, ties away from zero ----
DNL_DEVICE float to_tf32(float v) {
#ifdef DNL_EMULATOR
  return emulator::to_tf32(v);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
#endif
}

// d += a b: a is 16x8, b 8x8, both of tf32, d 16x8 in float. Lane l, g = l / 4, t = l % 4: a holds (g, t), (g+8, t),
// (g, t+4), (g+8, t+4), b (t, g), (t+4, g), d as above ----
DNL_DEVICE void mma_m16n8k8(float (&d)[4], const float (&a)[4], float b0, float b1) {
#ifdef DNL_EMULATOR
  const float b[2] = {b0, b1};
  emulator::mma_m16n8k8(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

}  // namespace dnl
