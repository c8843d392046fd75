// The adaptive temperature on the CPU: one call in place of some twenty operators on scalars.
#include "../temperature.h"

#include "../checks_temperature.h"

namespace ava {
namespace {

void temperature_step_(const Tensor& value,         // []
                       const Tensor& history,       // [kHistory]
                       const Tensor& count,         // [], int64
                       const Tensor& pending_loss,  // []: sum of the losses since the last step; set to 0
                       const Tensor& pending_rows,  // []: of so many rows; set to 0
                       double initial, double gain, double low, double high) {
  check_temperature_step("temperature_step_", value, history, count, pending_loss, pending_rows);
  auto* loss_sum = static_cast<float*>(pending_loss.mutable_data_ptr());
  auto* n_rows = static_cast<float*>(pending_rows.mutable_data_ptr());
  *static_cast<float*>(value.mutable_data_ptr()) =
      next_temperature(static_cast<float*>(history.mutable_data_ptr()), static_cast<int64_t*>(count.mutable_data_ptr()),
                       *loss_sum, *n_rows, {initial, gain, low, high});
  *loss_sum = *n_rows = 0;
}

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) { m.impl("temperature_step_", TORCH_BOX(&ava::temperature_step_)); }
