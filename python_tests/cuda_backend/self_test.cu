// Kernels that test the emulator itself: each uses the device wrappers as the operators do, and contains, switched on by
// `bug`, the mistakes that the emulator must find.
#include <cstdio>
#include <exception>

#include "common/device.cuh"

using namespace dnl;

enum Bug : int {
  kNone,
  kOutOfBounds,       // writes past the end of a shared array
  kMissingBarrier,    // reads what another warp wrote, without __syncthreads
  kDivergentShuffle,  // half a warp meets the other half in another collective
  kUnwrittenOutput,   // leaves the last row out
  kUnreachedBarrier,  // one warp returns before a shuffle that names it, another waits for it
  kWrongWait,         // waits for one cp.async group too few
  kMissingLoopBarrier,  // overwrites a tile that others still read
  kSmallShared,       // asks for less dynamic shared memory than the kernel uses
  kMisalignedRow,     // ldmatrix from an address that is no multiple of 16
  kUnwrittenShared,   // reads shared memory that nobody wrote
  kMisalignedVector,  // a 16-byte global load from an odd element
};

constexpr int kThreads = 128, kWarps = kThreads / 32;

// out[row] = sum of x[row, :], total += all of them.
static void row_sum(const float* x, float* out, float* total, int rows, int n, int bug) {
  DNL_SHARED(float, part, kWarps);
  const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) sum += load_global(x + int64_t(row) * n + i);
  sum = warp_sum(sum);
  if (bug == kMisalignedVector) sum += to_float(load_pack<float, 4>(x + 1).values[0]);
  if (lane == 0 && !(bug == kUnwrittenShared && warp == 2)) *(part + warp + (bug == kOutOfBounds)) = sum;
  if (bug != kMissingBarrier) __syncthreads();
  if (bug == kUnreachedBarrier && warp == 1) {
    if (lane == 0) return;
    __syncwarp();
  }
  if (warp == 0) {
    if (bug == kDivergentShuffle && lane < 16) __syncwarp();
    sum = lane < kWarps ? part[lane] : 0.f;
    sum = warp_sum(sum);
    if (lane == 0 && !(bug == kUnwrittenOutput && row == rows - 1)) {
      store_global(out + row, sum);
      atomicAdd(total, sum);
    }
  }
}

// c = a b, half types, 64x64 tiles, two stages of cp.async; m, n, k multiples of 64, 64, 32.
constexpr int kTile = 64, kDepth = 32, kStrideA = kDepth + 8, kStrideB = kTile + 8;
constexpr size_t kMatmulShared = 2 * (kTile * kStrideA + kDepth * kStrideB) * 2;
template <class T>
static void matmul(const T* a, const T* b, float* c, int n, int k, int bug) {
  DNL_DYNAMIC_SHARED(T, tile_a);
  T* tile_b = tile_a + 2 * kTile * kStrideA;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp / 2 * 32, column0 = warp % 2 * 32;
  a += int64_t(blockIdx.y) * kTile * k;
  b += blockIdx.x * kTile;
  float sum[2][4][4] = {};
  auto fetch = [&](int stage, int first) {
    for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kThreads) {
      const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
      cp_async16(&tile_a[(stage * kTile + row) * kStrideA + column], a + int64_t(row) * k + first + column);
    }
    for (int i = threadIdx.x; i < kDepth * kTile / 8; i += kThreads) {
      const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
      cp_async16(&tile_b[(stage * kDepth + row) * kStrideB + column], b + int64_t(first + row) * n + column);
    }
    cp_async_commit();
  };
  fetch(0, 0);
  for (int step = 0; step < k / kDepth; step++) {
    const bool more = step + 1 < k / kDepth;
    if (more) fetch((step + 1) % 2, (step + 1) * kDepth);
    if (bug == kWrongWait) cp_async_wait<1>();
    else if (more) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();
    const T* from_a = tile_a + step % 2 * kTile * kStrideA + (bug == kMisalignedRow);
    const T* from_b = tile_b + step % 2 * kDepth * kStrideB;
    for (int kk = 0; kk < kDepth; kk += 16)
      for (int i = 0; i < 2; i++) {
        uint32_t fa[4];
        ldmatrix(fa, &from_a[(row0 + i * 16 + lane % 16) * kStrideA + kk + lane / 16 * 8]);
        for (int j = 0; j < 4; j++) {
          uint32_t fb[2];
          ldmatrix<2, true>(fb, &from_b[(kk + lane % 16) * kStrideB + column0 + j * 8]);
          mma_m16n8k16<T>(sum[i][j], fa, fb[0], fb[1]);
        }
      }
    if (bug != kMissingLoopBarrier) __syncthreads();
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int e = 0; e < 4; e++) {
        const int64_t row = blockIdx.y * kTile + row0 + i * 16 + lane / 4 + e / 2 * 8;
        store_global(c + row * n + blockIdx.x * kTile + column0 + j * 8 + lane % 4 * 2 + e % 2, sum[i][j][e]);
      }
}

// What each lane of a warp gets from ldmatrix of four 8x8 matrices [4][8][8], whose rows lie `stride` elements apart, and
// from votes and shuffles of its lane number.
static void fragments(const uint16_t* matrices, uint32_t* plain, uint32_t* transposed, uint32_t* lanes, int stride) {
  DNL_DYNAMIC_SHARED(uint16_t, rows);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; i++) rows[lane * stride + i] = load_global(matrices + lane * 8 + i);
  __syncwarp();
  uint32_t f[4];
  ldmatrix(f, rows + lane * stride);
  for (int i = 0; i < 4; i++) store_global(plain + lane * 4 + i, f[i]);
  ldmatrix<4, true>(f, rows + lane * stride);
  for (int i = 0; i < 4; i++) store_global(transposed + lane * 4 + i, f[i]);
  store_global(lanes + lane, __ballot_sync(kFullWarp, lane % 3 == 0));
  store_global(lanes + 32 + lane, __shfl_up_sync(kFullWarp, static_cast<uint32_t>(lane), 1, 8));
  store_global(lanes + 64 + lane, __shfl_down_sync(kFullWarp, static_cast<uint32_t>(lane), 2, 16));
  store_global(lanes + 96 + lane, __shfl_sync(kFullWarp, static_cast<uint32_t>(lane), 5, 8));
  store_global(lanes + 128 + lane, static_cast<uint32_t>(__syncthreads_count(lane < 7)));
}

// Lane l copies 16 bytes of row 31 - l to row l by cp.async, zeros where l is a multiple of 3; then ldmatrix of one matrix,
// and of two, transposed, from the rows.
static void copies(const uint16_t* from, uint16_t* to, uint32_t* one, uint32_t* two) {
  DNL_SHARED(uint16_t, rows, 256);
  const int lane = threadIdx.x;
  cp_async16(rows + lane * 8, from + (31 - lane) * 8, lane % 3 != 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 8; i++) store_global(to + lane * 8 + i, rows[lane * 8 + i]);
  uint32_t f[1], g[2];
  ldmatrix(f, rows + lane % 8 * 8);
  ldmatrix<2, true>(g, rows + lane % 16 * 8);
  store_global(one + lane, f[0]);
  for (int i = 0; i < 2; i++) store_global(two + lane * 2 + i, g[i]);
}

// Lane l writes and reads B bytes of shared memory, `stride` bytes behind those of lane l - 1.
template <class T>
static void strided(T* out, int stride) {
  DNL_DYNAMIC_SHARED(unsigned char, memory);
  T* mine = reinterpret_cast<T*>(memory + threadIdx.x * stride);
  *mine = out[threadIdx.x];
  __syncwarp();
  store_global(out + threadIdx.x, *mine);
}

// d = a b + d from fragments as they are: a [32][4], b [32][2], d [32][4].
template <class T>
static void one_mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[4];
  float fd[4];
  for (int i = 0; i < 4; i++) fa[i] = load_global(a + lane * 4 + i);
  for (int i = 0; i < 4; i++) fd[i] = d[lane * 4 + i];
  mma_m16n8k16<T>(fd, fa, load_global(b + lane * 2), load_global(b + lane * 2 + 1));
  for (int i = 0; i < 4; i++) store_global(d + lane * 4 + i, fd[i]);
}

// The same of tf32: a [32][4], b [32][2], d [32][4]; `rounded`: by to_tf32 before.
static void one_mma_tf32(const float* a, const float* b, float* d, int rounded) {
  const int lane = threadIdx.x;
  float fa[4], fb[2], fd[4];
  for (int i = 0; i < 4; i++) fa[i] = load_global(a + lane * 4 + i);
  for (int i = 0; i < 2; i++) fb[i] = load_global(b + lane * 2 + i);
  for (int i = 0; i < 4; i++) fd[i] = d[lane * 4 + i];
  if (rounded)
    for (float& v : fa) v = to_tf32(v);
  mma_m16n8k8(fd, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; i++) store_global(d + lane * 4 + i, fd[i]);
}

// 16 KiB of static shared memory beside the dynamic.
static void static_and_dynamic(float* out) {
  DNL_SHARED(float, fixed, 4096);
  DNL_DYNAMIC_SHARED(float, given);
  fixed[threadIdx.x] = given[threadIdx.x] = 1;
  store_global(out + threadIdx.x, fixed[threadIdx.x] + given[threadIdx.x]);
}

// Each returns null, or what the emulator found.
static const char* caught(const std::function<void()>& body) {
  static char text[1024];
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    snprintf(text, sizeof text, "%s", error.what());
    return text;
  }
}

#define DNL_EXPORT extern "C" __attribute__((visibility("default"))) const char*

DNL_EXPORT run_row_sum(const float* x, float* out, float* total, int rows, int n, int bug) {
  return caught([&] { emulator::launch("row_sum", rows, kThreads, 0, [&] { row_sum(x, out, total, rows, n, bug); }); });
}
DNL_EXPORT run_matmul(const void* a, const void* b, float* c, int m, int n, int k, int bf16, int bug) {
  return caught([&] {
    const size_t shared = kMatmulShared - (bug == kSmallShared ? 32 : 0);
    emulator::launch("matmul", dim3(n / kTile, m / kTile), kThreads, shared, [&] {
      if (bf16) matmul(static_cast<const bfloat16_t*>(a), static_cast<const bfloat16_t*>(b), c, n, k, bug);
      else matmul(static_cast<const half_t*>(a), static_cast<const half_t*>(b), c, n, k, bug);
    });
  });
}
DNL_EXPORT run_fragments(const uint16_t* matrices, uint32_t* plain, uint32_t* transposed, uint32_t* lanes, int stride) {
  return caught([&] {
    emulator::launch("fragments", 1, 32, 64 * stride, [&] { fragments(matrices, plain, transposed, lanes, stride); });
  });
}
DNL_EXPORT run_copies(const uint16_t* from, uint16_t* to, uint32_t* one, uint32_t* two) {
  return caught([&] { emulator::launch("copies", 1, 32, 0, [&] { copies(from, to, one, two); }); });
}
DNL_EXPORT run_strided(void* out, int bytes, int stride) {
  return caught([&] {
    emulator::launch("strided", 1, 32, 32 * stride + 16, [&] {
      if (bytes == 4) strided(static_cast<float*>(out), stride);
      else if (bytes == 8) strided(static_cast<uint64_t*>(out), stride);
      else strided(static_cast<unsigned __int128*>(out), stride);
    });
  });
}
DNL_EXPORT run_static_and_dynamic(float* out, int dynamic_bytes, int allowed) {
  return caught([&] {
    static const char kAsked = 0, kUnasked = 0;  // two kernels, of which one is allowed more
    const void* function = allowed ? &kAsked : &kUnasked;
    if (allowed) emulator::allow_shared(function);
    emulator::launch("static_and_dynamic", 1, 32, dynamic_bytes, [&] { static_and_dynamic(out); }, function);
  });
}
DNL_EXPORT run_mma(const uint32_t* a, const uint32_t* b, float* d, int bf16) {
  return caught([&] {
    emulator::launch("mma", 1, 32, 0, [&] { bf16 ? one_mma<bfloat16_t>(a, b, d) : one_mma<half_t>(a, b, d); });
  });
}
DNL_EXPORT run_mma_tf32(const float* a, const float* b, float* d, int rounded) {
  return caught([&] { emulator::launch("mma_tf32", 1, 32, 0, [&] { one_mma_tf32(a, b, d, rounded); }); });
}
extern "C" __attribute__((visibility("default"))) void run_to_tf32(float* values, int count) {
  for (int i = 0; i < count; i++) values[i] = to_tf32(values[i]);
}
