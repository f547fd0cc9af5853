// The host side of a CUDA operator: the stream and device of its tensors, checked launches, registration. The same
// text serves the emulator, where tensors are on the CPU and a launch runs at once.
#pragma once
#include <string>

#include "common/device.cuh"
#include "common/torch.h"
#ifndef DNL_EMULATOR
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <set>
#include <utility>
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

#ifndef DNL_EMULATOR
inline void check_cuda(const char* name, cudaError_t error) {
  DNL_CHECK(error == cudaSuccess, "launch of ", name, ": ", cudaGetErrorString(error));
}

// torch's current stream of a device. Its stable C++ interface can tell since torch 2.13; this C function of
// libtorch_cuda is older. It is looked up in the library that is loaded already: whoever builds against a torch for CPUs
// has no such library to link.
inline cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  DNL_CHECK(function && function(device, &stream) == 0, "this torch does not tell its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}
#endif

// A block has 48 KiB of static and dynamic shared memory together, unless its kernel was given leave for more. Each kernel
// is, before its first launch on a device, for as much as the device has: what a single launch needs would be taken away
// again by a smaller launch of another host thread.
template <class Kernel>
void allow_shared_memory([[maybe_unused]] const char* name, Kernel* kernel) {
#ifdef DNL_EMULATOR
  emulator::allow_shared(reinterpret_cast<const void*>(kernel));
#else
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const void* function = reinterpret_cast<const void*>(kernel);
  int device = 0, most = 0;
  check_cuda(name, cudaGetDevice(&device));
  std::lock_guard lock(mutex);
  if (allowed.count({function, device})) return;
  cudaFuncAttributes facts;
  check_cuda(name, cudaFuncGetAttributes(&facts, function));
  check_cuda(name, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check_cuda(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        most - static_cast<int>(facts.sharedSizeBytes)));
  allowed.insert({function, device});
#endif
}

// Launches on the current stream of the tensor's device; the device is current while the launcher lives.
class Launcher {
 public:
#ifdef DNL_EMULATOR
  explicit Launcher(const Tensor&) {}
#else
  explicit Launcher(const Tensor& example)
      : guard_(example.get_device_index()), stream_(current_stream(example.get_device_index())) {}
#endif

  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                  Arguments... arguments) const {
    if (shared_bytes) allow_shared_memory(name, kernel);
#ifdef DNL_EMULATOR
    emulator::launch(name, grid, dim3(threads), shared_bytes, [&] { kernel(arguments...); },
                     reinterpret_cast<const void*>(kernel));
  }
#else
    kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
    check_cuda(name, cudaGetLastError());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

}  // namespace dnl
