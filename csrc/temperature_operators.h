// temperature_step_, written once for every device.
#pragma once
#include "checks.h"
#include "temperature.h"

namespace ava {

inline void check_temperature_step(const char* op,
                                   const Tensor& value,           // []
                                   const Tensor& history,         // [kHistory]
                                   const Tensor& count,           // []
                                   const Tensor& pending_loss,    // []
                                   const Tensor& pending_rows) {  // []
  check_tensor(op, "value", value, {}, ScalarType::Float);
  check_tensor(op, "history", history, {kHistory}, ScalarType::Float);
  check_tensor(op, "count", count, {}, ScalarType::Long);
  check_tensor(op, "pending_loss", pending_loss, {}, ScalarType::Float);
  check_tensor(op, "pending_rows", pending_rows, {}, ScalarType::Float);
  AVA_CHECK(history.is_contiguous(), op, ": expected a contiguous history");
  for (const Tensor& state : {history, count, pending_loss, pending_rows})
    AVA_CHECK(state.device() == value.device(), op, ": expected every buffer on one device");
}

// `step` takes it: step(value, state, options).
template <auto step>
void temperature_step_(const Tensor& value,         // []
                       const Tensor& history,       // [kHistory]
                       const Tensor& count,         // [], int64
                       const Tensor& pending_loss,  // []: sum of the losses since the last step; set to 0
                       const Tensor& pending_rows,  // []: of so many rows; set to 0
                       double initial, double gain, double low, double high) {
  check_temperature_step("temperature_step_", value, history, count, pending_loss, pending_rows);
  const auto numbers = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  step(value,
       TemperatureState{numbers(value), numbers(history), static_cast<int64_t*>(count.mutable_data_ptr()),
                        numbers(pending_loss), numbers(pending_rows)},
       TemperatureOptions{initial, gain, low, high});
}

}  // namespace ava
