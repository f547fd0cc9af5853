// Activations and their derivatives on vectors: z -> (value, derivative). Included by cpu_kernel files only.
#pragma once
#include "common/conv.h"
#include "common/vec.h"

namespace dnl::DNL_ISA {

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int kTerms = 7;  // of exp(r) - 1, |r| <= ln(2) / 2: below half a unit in the last place
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  static constexpr float kLargest = 87.0f;
};
template <>
struct FloatBits<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kTerms = 13;
  static constexpr double kLn2High = 0.69314718036912381649, kLn2Low = 1.9082149292705877e-10;
  static constexpr double kLargest = 708.0;
};

template <class T>
DNL_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  const Vec<T> l = broadcast(low), h = broadcast(high);
  x = l > x ? l : x;  // NaN stays NaN
  return h < x ? h : x;
}

// exp(x) = scale + scale * fraction, scale a power of two; x is limited to where scale is a normal number.
template <class T>
DNL_INLINE void exp_parts(Vec<T> x, Vec<T>& scale, Vec<T>& fraction) {
  using B = FloatBits<T>;
  x = clamp<T>(x, -B::kLargest, B::kLargest);
  const Vec<T> shifted = x * broadcast(T(1.4426950408889634)) + broadcast(B::kRound);
  const Vec<T> n = shifted - broadcast(B::kRound);
  const Vec<T> r = (x - n * broadcast(B::kLn2High)) - n * broadcast(B::kLn2Low);
  Vec<T> sum = broadcast(T(1));  // 1 + r/2 (1 + r/3 (1 + ...))
#pragma GCC unroll 16
  for (int i = B::kTerms; i >= 2; i--) sum = broadcast(T(1)) + sum * r * broadcast(T(1) / T(i));
  fraction = sum * r;
  IntVec<T> bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + B::kBias) << B::kMantissa;
  memcpy(&scale, &bits, sizeof bits);
}

template <class T>
DNL_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> scale, fraction;
  exp_parts<T>(x, scale, fraction);
  return scale + scale * fraction;
}

// exp(x^2) erfc(x) for x in [0, 6.2] is a polynomial of degree 16 in t = (1 - 0.35 x) / (1 + 0.35 x) to 1.2e-15
// (a least-squares fit on Chebyshev points); past 6.2 erfc vanishes next to 1 and the fit need only stay bounded.
template <class T>
DNL_INLINE Vec<T> scaled_erfc(Vec<T> x) {
  constexpr double c[] = {
      0.18710637671147134,     0.33828498057939416,     0.24829090258034375,    0.14466059383960633,
      0.063467768868436886,    0.018210781783724105,    0.0015037387384248015,  -0.0012234291917110293,
      -0.00042234383017989709, 7.1991284520529623e-05,  6.1434849371962258e-05, -5.6703424023770584e-06,
      -9.2196518509965618e-06, 1.0189525986650283e-06,  1.7223002657962389e-06, -7.5010838781527955e-07,
      1.0263637309903619e-07};
  const Vec<T> one = broadcast(T(1)), h = broadcast(T(0.35)) * x, t = (one - h) / (one + h);
  Vec<T> sum = broadcast(T(c[16]));
#pragma GCC unroll 16
  for (int i = 15; i >= 0; i--) sum = sum * t + broadcast(T(c[i]));
  return sum;
}

template <class T>
DNL_INLINE Vec<T> absolute(Vec<T> x) {
  return x < Vec<T>{} ? -x : x;
}

// The conventions at 0 are PyTorch's: relu'(0) = 0, leaky_relu'(0) = leak; gelu is exact.
template <class T, ActivationKind A>
DNL_INLINE void activate(Vec<T> z, T leak, Vec<T>& value, Vec<T>& derivative) {
  const Vec<T> zero{}, one = broadcast(T(1));
  if constexpr (A == ActivationKind::identity) {
    value = z;
    derivative = one;
  } else if constexpr (A == ActivationKind::relu) {
    value = zero > z ? zero : z;
    derivative = zero < z ? one : zero;
  } else if constexpr (A == ActivationKind::leaky_relu) {
    derivative = zero < z ? one : broadcast(leak);
    value = z * derivative;
  } else if constexpr (A == ActivationKind::tanh) {
    // tanh |z| = m / (m + 2), m = exp(2 |z|) - 1 computed without cancellation, so that small z keep all their digits
    Vec<T> scale, fraction;
    exp_parts<T>(clamp<T>(absolute<T>(z), T(0), T(20)) * broadcast(T(2)), scale, fraction);
    const Vec<T> m = scale * fraction + (scale - one), t = m / (m + broadcast(T(2)));
    value = z < zero ? -t : t;
    derivative = one - t * t;
  } else if constexpr (A == ActivationKind::gelu) {
    const Vec<T> x = absolute<T>(z) * broadcast(T(0.70710678118654752440)), density = exp<T>(-x * x);
    const Vec<T> tail = broadcast(T(0.5)) * density * scaled_erfc<T>(x);  // the smaller of Phi(z), Phi(-z)
    const Vec<T> phi = z < zero ? tail : one - tail;
    value = z * phi;
    derivative = phi + z * density * broadcast(T(0.39894228040143267794));
  } else {
    const Vec<T> sigmoid = one / (one + exp<T>(-z));
    value = z * sigmoid;
    derivative = sigmoid * (one + z * (one - sigmoid));
  }
}

// Calls body(std-free integral constant) with the activation as a template argument: body.template operator()<A>().
template <class Body>
DNL_INLINE void dispatch_activation(ActivationKind activation, Body body) {
  switch (activation) {
    case ActivationKind::identity: return body.template operator()<ActivationKind::identity>();
    case ActivationKind::relu: return body.template operator()<ActivationKind::relu>();
    case ActivationKind::leaky_relu: return body.template operator()<ActivationKind::leaky_relu>();
    case ActivationKind::tanh: return body.template operator()<ActivationKind::tanh>();
    case ActivationKind::gelu: return body.template operator()<ActivationKind::gelu>();
    case ActivationKind::silu: return body.template operator()<ActivationKind::silu>();
  }
}

}  // namespace dnl::DNL_ISA
