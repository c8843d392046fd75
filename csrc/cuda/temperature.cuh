// The adaptive temperature on the device: one launch in place of some twenty, and nothing comes back to the host.
#pragma once
#include "../temperature.h"
#include "dialect.cuh"

namespace ava {

static __global__ void temperature_kernel(const TemperatureState state, const TemperatureOptions options) {
  *state.value = next_temperature(state.history, state.count, *state.pending_loss, *state.pending_rows, options);
  *state.pending_loss = *state.pending_rows = 0;
}

inline void temperature_step(const TemperatureState& state, const TemperatureOptions& options, Stream stream) {
  launch("temperature_step_", temperature_kernel, {dim3(1), dim3(1)}, stream, state, options);
}

}  // namespace ava
