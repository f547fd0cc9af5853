// Winograd's F(4, 3) on vectors: four outputs of a filter of three taps by six products. Included by cpu_kernel files only.
#pragma once
#include "common/vec.h"

namespace dnl::DNL_ISA {

// The matrices for the points 0, +-a, +-b, infinity: sums and differences of m[1], m[2] and of m[3], m[4].
struct Rows3 {
  static constexpr int kRows = 4, kParts = 6, kReach = 1;
  static constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b, p = aa * bb, s = aa + bb;

  // B^T d
  template <class V>
  static DNL_INLINE void analyse(const V (&d)[6], V (&t)[6]) {
    const V even_a = d[4] - bb * d[2], odd_a = d[3] - bb * d[1], even_b = d[4] - aa * d[2], odd_b = d[3] - aa * d[1];
    t[0] = p * d[0] + (d[4] - s * d[2]);
    t[1] = even_a + a * odd_a;
    t[2] = even_a - a * odd_a;
    t[3] = even_b + b * odd_b;
    t[4] = even_b - b * odd_b;
    t[5] = p * d[1] + (d[5] - s * d[3]);
  }
  // A^T m
  template <class V>
  static DNL_INLINE void synthesise(const V (&m)[6], V (&y)[4]) {
    const V u = m[1] + m[2], v = m[1] - m[2], w = m[3] + m[4], z = m[3] - m[4];
    y[0] = m[0] + u + w;
    y[1] = a * v + b * z;
    y[2] = aa * u + bb * w;
    y[3] = (a * aa) * v + ((b * bb) * z + m[5]);
  }
  // A y
  template <class V>
  static DNL_INLINE void spread(const V (&y)[4], V (&t)[6]) {
    const V even_a = y[0] + aa * y[2], odd_a = y[1] + aa * y[3], even_b = y[0] + bb * y[2], odd_b = y[1] + bb * y[3];
    t[0] = y[0];
    t[1] = even_a + a * odd_a;
    t[2] = even_a - a * odd_a;
    t[3] = even_b + b * odd_b;
    t[4] = even_b - b * odd_b;
    t[5] = y[3];
  }
  // B m for the rows of the group itself; the groups before and after it reach in with one part each.
  template <class V>
  static DNL_INLINE void gather_back(const V (&m)[6], V before, V after, V (&d)[4]) {
    const V u = m[1] + m[2], v = m[1] - m[2], w = m[3] + m[4], z = m[3] - m[4];
    d[0] = before + (p * m[5] - ((a * bb) * v + (b * aa) * z));
    d[1] = -s * m[0] - (bb * u + aa * w);
    d[2] = a * v + (b * z - s * m[5]);
    d[3] = p * after + (m[0] + (u + w));
  }
};

}  // namespace dnl::DNL_ISA
