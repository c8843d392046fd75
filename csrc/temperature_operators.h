// temperature_step_, written once for every device.
#pragma once
#include "checks.h"
#include "temperature.h"

namespace ava {

// `step` takes it: step(value, state, options).
template <auto step>
void temperature_step_(const Tensor& value,         // []
                       const Tensor& history,       // [kHistory]
                       const Tensor& count,         // [], int64
                       const Tensor& pending_loss,  // []: sum of the losses since the last step; set to 0
                       const Tensor& pending_rows,  // []: of so many rows; set to 0
                       double initial, double gain, double low, double high) {
  const char* op = "temperature_step_";
  check_tensor(op, "value", value, {}, ScalarType::Float);
  check_beside(op, "history", history, {kHistory}, ScalarType::Float, value);
  check_beside(op, "count", count, {}, ScalarType::Long, value);
  check_beside(op, "pending_loss", pending_loss, {}, ScalarType::Float, value);
  check_beside(op, "pending_rows", pending_rows, {}, ScalarType::Float, value);
  AVA_CHECK(history.is_contiguous(), op, ": expected a contiguous history");
  const auto numbers = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  step(value,
       TemperatureState{numbers(value), numbers(history), static_cast<int64_t*>(count.mutable_data_ptr()),
                        numbers(pending_loss), numbers(pending_rows)},
       TemperatureOptions{initial, gain, low, high});
}

}  // namespace ava
