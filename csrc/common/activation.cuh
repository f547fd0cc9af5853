// The pointwise activations and their derivatives in a kernel; which one is a value, the same for the whole launch.
#pragma once
#include "common/conv.h"
#include "common/device.cuh"

namespace dnl {

DNL_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

DNL_DEVICE float activate(Activation activation, float x) {
  switch (activation.kind) {
    case ActivationKind::relu: return x < 0 ? 0.0f : x;  // NaN stays NaN
    case ActivationKind::leaky_relu: return x < 0 ? float(activation.leak) * x : x;
    case ActivationKind::tanh: return tanhf(x);
    case ActivationKind::gelu: return x * (0.5f + 0.5f * erff(x * 0.70710678f));
    case ActivationKind::silu: return x * logistic(x);
    default: return x;
  }
}

DNL_DEVICE float activation_slope(Activation activation, float x) {
  switch (activation.kind) {
    case ActivationKind::relu: return x > 0 ? 1.0f : 0.0f;
    case ActivationKind::leaky_relu: return x > 0 ? 1.0f : float(activation.leak);
    case ActivationKind::tanh: {
      const float t = tanhf(x);
      return 1.0f - t * t;
    }
    case ActivationKind::gelu: return 0.5f + 0.5f * erff(x * 0.70710678f) + x * 0.39894228f * expf(-0.5f * x * x);
    case ActivationKind::silu: {
      const float s = logistic(x);
      return s * (1.0f + x * (1.0f - s));
    }
    default: return 1.0f;
  }
}

}  // namespace dnl
