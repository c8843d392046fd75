// What an operator on CUDA needs of torch: its device, its stream, its place in the dispatcher.
//
//   Tensor scale_cuda(const Tensor& rows) {                       // csrc/cuda/<stem>.cu
//     check_scale(rows);
//     const DeviceScope device(rows);                             // current device and stream of torch
//     Tensor out = torch::stable::empty_like(rows);
//     if (rows.numel() > 0) launch_scale(..., device.limits(), device.stream());
//     return out;
//   }
//   AVA_CUDA_OPERATORS(m) { m.impl("scale", AVA_BOX(&ava::scale_cuda)); }
//
// The same file, compiled by g++ for the emulator, registers for CPU tensors in the namespace ava_ext_emulated.
#pragma once
#include "../error.h"
#include "../torch_stable.h"
#include "dialect.cuh"

#ifdef __CUDACC__

#define AVA_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ava_ext, CUDA, m)

// Lives in libtorch_cuda, which a CPU-only torch lacks. Weak, so that the library loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace ava {

// While it lives, the device of `tensor` is the current one.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : device_index_(tensor.get_device_index()), guard_(device_index_) {
    AVA_CHECK(aoti_torch_get_current_cuda_stream, "ava_ext: expected a torch with CUDA");
    void* stream = nullptr;
    AVA_CHECK(aoti_torch_get_current_cuda_stream(device_index_, &stream) == TORCH_SUCCESS,
              "ava_ext: torch has no stream on CUDA device ", device_index_);
    stream_ = static_cast<Stream>(stream);
  }

  Stream stream() const { return stream_; }
  const DeviceLimits& limits() const { return device_limits(device_index_); }

 private:
  int32_t device_index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace ava

#else
#include "emulated_launch.h"
#endif
