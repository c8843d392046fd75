// The operators of csrc/cuda over CPU tensors, in a namespace of their own.
#pragma once
#include "cuda_emulator.h"

#define AVA_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ava_ext_ptx, CPU, m)

namespace ava {

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}

  Stream stream() const { return nullptr; }
  const DeviceLimits& limits() const { return device_limits(0); }
};

}  // namespace ava
