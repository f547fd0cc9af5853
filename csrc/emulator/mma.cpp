// mma.sync: gathers the lanes' fragments into matrices, multiplies, hands the result back. Layouts: PTX ISA, "Matrix
// Fragments for mma.m16n8k16 with floating point type" and "mma.m16n8k8"; python_tests/cuda_backend checks them against a second source.
#include "emulator/internal.h"

namespace emulator {

struct Fragments {
  float* d;
  const uint32_t *a, *b;
  Element element;
};

static EMULATOR_UNSEEN float widen(uint32_t pair, int high, Element element) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * high));
  if (element == Element::bf16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &word, sizeof value);
    return value;
  }
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

static EMULATOR_UNSEEN void multiply(void** lanes, uint32_t mask) {
  if (mask != 0xffffffffu) fail("mma: mask %08x is not a full warp", mask);
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments& f = *static_cast<Fragments*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int high = 0; high < 2; high++) {
      for (int i = 0; i < 4; i++) a[group + i % 2 * 8][pair + high + i / 2 * 8] = widen(f.a[i], high, f.element);
      for (int i = 0; i < 2; i++) b[pair + high + i * 8][group] = widen(f.b[i], high, f.element);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    const Fragments& f = *static_cast<Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = f.d[i];
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      f.d[i] = sum;
    }
  }
  counts.mma++;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element element) {
  Fragments mine{d, a, b, element};
  collective(0xffffffffu, element == Element::bf16 ? "mma.bf16" : "mma.f16", &mine, multiply);
}

// ---- tf32 ----
constexpr uint32_t kBeyondTf32 = (1u << 13) - 1;  // the digits of a float that tf32 lacks

EMULATOR_UNSEEN float to_tf32(float value) {
  if (value != value) return value;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits >> 23 & 0xff) != 0xff) bits = (bits + (1u << 12)) & ~kBeyondTf32;  // may round up to infinity
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

struct Fragments32 {
  float* d;
  const float *a, *b;
};

static EMULATOR_UNSEEN float operand(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value == value && (bits & kBeyondTf32)) fail("mma.tf32: the operand %.9g is no tf32 number", value);
  return value;
}

static EMULATOR_UNSEEN void multiply_tf32(void** lanes, uint32_t mask) {
  if (mask != 0xffffffffu) fail("mma: mask %08x is not a full warp", mask);
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments32& f = *static_cast<Fragments32*>(lanes[lane]);
    for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = operand(f.a[i]);
    for (int i = 0; i < 2; i++) b[lane % 4 + i * 4][lane / 4] = operand(f.b[i]);
  }
  for (int lane = 0; lane < 32; lane++) {
    const Fragments32& f = *static_cast<Fragments32*>(lanes[lane]);
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 8; k++) f.d[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
  counts.mma++;
}

void mma_m16n8k8(float* d, const float* a, const float* b) {
  Fragments32 mine{d, a, b};
  collective(0xffffffffu, "mma.tf32", &mine, multiply_tf32);
}

}  // namespace emulator
