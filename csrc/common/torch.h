// What every cpu.cpp and cuda.cu needs of torch: the stable ABI, short names, and checks whose message names the operator.
// Users' mistakes are caught in Python (dnl_kernels/_checks.py); a check here guards the memory accesses that follow.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#define DNL_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace dnl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::parallel_for;

inline bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// The tensor as the kernels read it: contiguous, half types widened to the float32 that they accumulate in.
inline Tensor widened(const Tensor& t) {
  return torch::stable::contiguous(is_half(t.scalar_type()) ? torch::stable::to(t, ScalarType::Float) : t);
}

// The result in the element type of the operator's inputs.
inline Tensor narrowed(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// Runs `body(T{})` for the element type that the kernels compute in.
template <class Body>
void dispatch_float(const char* op, ScalarType type, Body body) {
  if (type == ScalarType::Float) return body(float{});
  if (type == ScalarType::Double) return body(double{});
  DNL_CHECK(false, op, ": element type must be float32 or float64");
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

}  // namespace dnl
