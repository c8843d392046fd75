// What temperature_step_ expects of its buffers.
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
  STD_TORCH_CHECK(history.is_contiguous(), op, ": expected a contiguous history");
}

}  // namespace ava
