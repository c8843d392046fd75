// The adaptive temperature on CUDA. The kernel is in temperature.cuh.
#include "temperature.cuh"

#include "../temperature_operators.h"
#include "launch.h"

namespace ava {
namespace {

void step(const Tensor& value, const TemperatureState& state, const TemperatureOptions& options) {
  const DeviceScope device(value);
  temperature_step(state, options, device.stream());
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) { m.impl("temperature_step_", AVA_BOX(&ava::temperature_step_<ava::step>)); }
