// The adaptive temperature on CUDA. The kernel is in temperature.cuh.
#include "temperature.cuh"

#include "../checks_temperature.h"
#include "launch.h"

namespace ava {
namespace {

void temperature_step_(const Tensor& value,         // []
                       const Tensor& history,       // [kHistory]
                       const Tensor& count,         // [], int64
                       const Tensor& pending_loss,  // []: sum of the losses since the last step; set to 0
                       const Tensor& pending_rows,  // []: of so many rows; set to 0
                       double initial, double gain, double low, double high) {
  const char* op = "temperature_step_";
  check_temperature_step(op, value, history, count, pending_loss, pending_rows);
  for (const Tensor& state : {history, count, pending_loss, pending_rows})
    STD_TORCH_CHECK(state.device() == value.device(), op, ": expected every buffer on one device");
  const DeviceScope device(value);
  temperature_step(
      {static_cast<float*>(value.mutable_data_ptr()), static_cast<float*>(history.mutable_data_ptr()),
       static_cast<int64_t*>(count.mutable_data_ptr()), static_cast<float*>(pending_loss.mutable_data_ptr()),
       static_cast<float*>(pending_rows.mutable_data_ptr())},
      {initial, gain, low, high}, device.stream());
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) { m.impl("temperature_step_", TORCH_BOX(&ava::temperature_step_)); }
