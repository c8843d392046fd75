// The adaptive temperature on the CPU: one call in place of some twenty operators on scalars.
#include "../temperature_operators.h"

namespace ava {
namespace {

void step(const Tensor&, const TemperatureState& state, const TemperatureOptions& options) {
  *state.value = next_temperature(state.history, state.count, *state.pending_loss, *state.pending_rows, options);
  *state.pending_loss = *state.pending_rows = 0;
}

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) { m.impl("temperature_step_", AVA_BOX(&ava::temperature_step_<ava::step>)); }
