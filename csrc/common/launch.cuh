// The host side of a CUDA operator: the stream and device of its tensors, checked launches, registration. The same
// text serves the emulator, where tensors are on the CPU and a launch runs at once.
#pragma once
#include <string>

#include "common/device.cuh"
#include "common/torch.h"
#ifndef DNL_EMULATOR
#include <torch/csrc/stable/accelerator.h>
#endif

// DNL_CUDA_LIBRARY(m) { m.impl(...); } at the end of a cuda.cu.
#ifdef DNL_EMULATOR
#define DNL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(dnl_emulated, CPU, m)
#else
#define DNL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(dnl, CUDA, m)
#endif

namespace dnl {

// Runs body(T{}) for the element type of the kernels.
template <class Body>
void dispatch_device(const char* op, ScalarType type, Body body) {
  if (type == ScalarType::Float) return body(float{});
  if (type == ScalarType::Half) return body(half_t{});
  if (type == ScalarType::BFloat16) return body(bfloat16_t{});
  DNL_CHECK(false, op, ": element type must be float32, float16 or bfloat16");
}

// Launches on the current stream of the tensor's device; the device is current while the launcher lives.
class Launcher {
 public:
#ifdef DNL_EMULATOR
  explicit Launcher(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                  Arguments... arguments) const {
    emulator::launch(name, grid, dim3(threads), shared_bytes, [&] { kernel(arguments...); });
  }
#else
  explicit Launcher(const Tensor& example)
      : guard_(example.get_device_index()),
        stream_(static_cast<cudaStream_t>(
            torch::stable::accelerator::getCurrentStream(example.get_device_index()).nativeHandle())) {}

  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                  Arguments... arguments) const {
    constexpr size_t kDefaultLimit = 48 << 10;
    if (shared_bytes > kDefaultLimit)
      check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)));
    kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
    check(name, cudaGetLastError());
  }

 private:
  static void check(const char* name, cudaError_t error) {
    DNL_CHECK(error == cudaSuccess, "launch of ", name, ": ", cudaGetErrorString(error));
  }
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

}  // namespace dnl
