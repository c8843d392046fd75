// The adaptive temperature: a pure function of the last losses. Free of torch.
//
//   T = clamp(T0 (1 + gain (cv - 0.075)), bounds),   cv = population standard deviation / mean of the recorded losses
//
// from kFirstLosses on, else T0. A ring of kHistory losses; one that is not finite, or of no rows, is not recorded.
#pragma once
#include <math.h>

#include "element_type.h"

namespace ava {
inline namespace AVA_ISA {

constexpr int64_t kHistory = 100, kFirstLosses = 10;

// Where the state lies, on its device.
struct TemperatureState {
  float* value;
  float* history;  // [kHistory]
  int64_t* count;
  float *pending_loss, *pending_rows;
};

struct TemperatureOptions {
  double initial, gain, low, high;
};

AVA_HOST_DEVICE float next_temperature(float* history,  // [kHistory]
                                       int64_t* count,  // losses recorded so far
                                       float loss_sum, float n_rows, const TemperatureOptions& options) {
  if (*count < 0) *count = 0;            // of a damaged checkpoint
  const float loss = loss_sum / n_rows;  // nan without rows
  if (fabsf(loss) < INFINITY) history[(*count)++ % kHistory] = loss;
  const int64_t n = *count < kHistory ? *count : kHistory;
  if (n < kFirstLosses) return float(options.initial);
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < n; ++i) mean += history[i] / double(n);
  for (int64_t i = 0; i < n; ++i) variance += (history[i] - mean) * (history[i] - mean) / double(n);
  if (!(mean > 0)) return float(options.initial);  // a perfect model has no volatility to speak of
  const double wanted = options.initial * (1 + options.gain * (sqrt(variance) / mean - 0.075));
  return float(wanted < options.low ? options.low : wanted > options.high ? options.high : wanted);
}

}  // namespace AVA_ISA
}  // namespace ava
