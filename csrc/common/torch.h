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
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define DNL_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace dnl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// The tensor as the kernels read it: contiguous, half types widened to the float32 that they accumulate in.
inline Tensor widened(const Tensor& t) {
  const Tensor wide = is_half(t.scalar_type()) ? torch::stable::to(t, ScalarType::Float) : t;
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);  // a call through the dispatcher
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

// The tensor, new and still unwritten, in pages of 2 MiB where the system has them on request (Linux's default): asking
// for its memory 4 KiB at a time, and finding it again, took a tenth of a training step of dnl_block. Only advice: what
// is smaller than a page, or refused, stays as it is.
inline Tensor in_large_pages(Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr()), bytes = t.numel() * t.element_size();
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

// The elements; of a const type where they are only read, since asking to write makes a copy of memory that is shared
// until it is written (the output of an operator that keeps it for its backward).
template <class T>
T* elements_of(const Tensor& t) {
  if constexpr (std::is_const_v<T>) return static_cast<T*>(t.const_data_ptr());
  else return static_cast<T*>(t.data_ptr());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

}  // namespace dnl
