// The emulated csrc/cuda/launch.h: operators over CPU tensors, in a namespace of their own.
// Whoever includes it may define AVA_OPERATORS_ON_CPU, to have another.
#pragma once
#include "cuda_emulator.h"

#ifndef AVA_OPERATORS_ON_CPU
#define AVA_OPERATORS_ON_CPU ava_ext_emulated
#endif
#define AVA_CUDA_OPERATORS(m) AVA_OPERATORS_OF(AVA_OPERATORS_ON_CPU, m)
#define AVA_OPERATORS_OF(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)  // expands the name first

namespace ava {

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}

  Stream stream() const { return nullptr; }
  const DeviceLimits& limits() const { return device_limits(0); }
};

}  // namespace ava
