// The spellings that kernels use in place of CUDA's own syntax, so that the same text is compiled by nvcc and, by g++,
// for the emulator of the tests (tests/cuda_emulator, found on the include path). Free of torch.
//
//   AVA_SHARED(Type, name, count);     an array in shared memory, of a size known to the compiler
//   AVA_DYNAMIC_SHARED(name);          unsigned char* name: the bytes that the launch asked for, 16-byte aligned
//   AVA_DEVICE_CHECK(condition);       a device assert, which stays in a release build
//   launch(op, kernel, shape, stream, arguments...);    the only way to start a kernel; throws on an error
//   device_limits(device_index), resident_clusters(op, kernel, shape)    what a grid is planned with
//
// Everything else is plain CUDA: threadIdx, __syncthreads(), __shfl_xor_sync(...), __global__, __launch_bounds__.
// Instructions that need assembly are in primitives.cuh. A kernel is a __global__ function in <stem>.cuh, beside a host
// function that plans and launches it from raw pointers; <stem>.cu has the operators.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ava {

struct DeviceLimits {
  int n_multiprocessors;
  int shared_per_multiprocessor, shared_per_block, shared_reserved_per_block;  // bytes
  int largest_cluster;                                                         // 1 below sm_90
};

}  // namespace ava

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>
#include <vector>

// what assert() calls on the device; the toolkit declares it only where assert.h comes first
extern "C" __host__ __device__ void __assert_fail(const char* condition, const char* file, unsigned line,
                                                  const char* function) noexcept;

#define AVA_SHARED(Type, name, count) __shared__ Type name[count]
#define AVA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// __assert_fail ends the kernel, but the compiler is not told so: the trap behind it, which is never reached, says that
// nothing lives on, so that no register is kept over the call
#define AVA_DEVICE_CHECK(condition) \
  ((condition) ? void() : (__assert_fail(#condition, __FILE__, static_cast<unsigned>(__LINE__), __func__), __trap()))

namespace ava {

using Stream = cudaStream_t;

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;    // dynamic
  unsigned cluster_size = 1;  // blocks, along x; divides grid.x
};

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// The limits of each device, asked for once.
inline const DeviceLimits& device_limits(int device_index) {
  static std::mutex mutex;
  static std::vector<DeviceLimits*> limits_of;  // never freed: operators keep references
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device_index) >= limits_of.size()) limits_of.resize(device_index + 1, nullptr);
  DeviceLimits*& limits = limits_of[device_index];
  if (limits) return *limits;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda("device_limits", cudaDeviceGetAttribute(&value, which, device_index));
    return value;
  };
  limits = new DeviceLimits{
      attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrReservedSharedMemoryPerBlock),
      attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 8 : 1};  // 8: the most that a kernel need not ask for
  return *limits;
}

constexpr size_t kSharedWithoutAsking = 48 * 1024;  // a kernel that wants more has to say so first

// cudaLaunchKernelEx's description of a launch. Points into itself: stays where it is.
class LaunchConfiguration {
 public:
  LaunchConfiguration(const LaunchShape& shape, Stream stream) {
    configuration.gridDim = shape.grid;
    configuration.blockDim = shape.block;
    configuration.dynamicSmemBytes = shape.shared_bytes;
    configuration.stream = stream;
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = shape.cluster_size;
    cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
    configuration.attrs = &cluster_;
    configuration.numAttrs = shape.cluster_size > 1;
  }
  LaunchConfiguration(const LaunchConfiguration&) = delete;

  cudaLaunchConfig_t configuration{};

 private:
  cudaLaunchAttribute cluster_{};
};

// Once for each kernel and device, as much as the device grants: an allowance of what one launch wants could be lowered
// by another thread before that launch.
inline void allow_shared_memory(const char* op, const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= kSharedWithoutAsking) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device_index = 0;
  check_cuda(op, cudaGetDevice(&device_index));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device_index})) return;
  cudaFuncAttributes attributes;
  check_cuda(op, cudaFuncGetAttributes(&attributes, kernel));
  const int most = device_limits(device_index).shared_per_block - int(attributes.sharedSizeBytes);
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed.insert({kernel, device_index});
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
            Arguments&&... arguments) {
  allow_shared_memory(op, reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  const LaunchConfiguration launch(shape, stream);
  check_cuda(op, cudaLaunchKernelEx(&launch.configuration, kernel, static_cast<Parameters>(arguments)...));
}

// How many clusters of this shape (blocks, where cluster_size is 1) the device runs at the same time. 0: a part of a
// device may be too small for a cluster, and a kernel that was compiled for devices without clusters has none anywhere.
template <class... Parameters>
int resident_clusters(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape) {
  allow_shared_memory(op, reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  int resident = 0;
  if (shape.cluster_size > 1) {
    cudaFuncAttributes attributes;
    check_cuda(op, cudaFuncGetAttributes(&attributes, kernel));
    if (attributes.ptxVersion < 90) return 0;
    const LaunchConfiguration launch(shape, nullptr);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&resident, kernel, &launch.configuration);
    if (error == cudaErrorInvalidClusterSize) {
      cudaGetLastError();  // else the next check finds it
      return 0;
    }
    check_cuda(op, error);
    return resident;
  }
  int device_index = 0;
  check_cuda(op, cudaGetDevice(&device_index));
  const int n_threads = int(shape.block.x * shape.block.y * shape.block.z);
  check_cuda(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, n_threads, shape.shared_bytes));
  return resident * device_limits(device_index).n_multiprocessors;
}

}  // namespace ava

#else
#include "cuda_emulator.h"
#endif
