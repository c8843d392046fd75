// The temperature kernel: the host's function, run on the device.
#include <vector>

#include "../../csrc/cuda/temperature.cuh"
#include "schedules.h"

int main() {
  const ava::TemperatureOptions options{1.0, 2.0, 0.1, 10.0};
  cuda_emulator::under_every_schedule([&] {
    std::vector<float> history(ava::kHistory, 0.0f), expected_history(ava::kHistory, 0.0f);
    int64_t count = 0, expected_count = 0;
    for (int step = 0; step < 110; ++step) {
      const float loss_sum = 8.0f + float(step % 5), n_rows = step == 4 ? 0.0f : 4.0f;
      float value = -1, pending_loss = loss_sum, pending_rows = n_rows;
      ava::temperature_step({&value, history.data(), &count, &pending_loss, &pending_rows}, options, nullptr);
      const float expected = ava::next_temperature(expected_history.data(), &expected_count, loss_sum, n_rows, options);
      EXPECT_CLOSE(value, expected, 0);
      EXPECT(pending_loss == 0 && pending_rows == 0);
    }
    EXPECT(count == 109 && expected_count == 109 && history == expected_history);
  });
  return expect::exit_code();
}
