// The kernel of row weights: the host's functions, run on the device.
#include <memory>
#include <vector>

#include "../../csrc/cuda/row_weights.cuh"
#include "schedules.h"

template <class Real>
void check(int64_t batch_size, int64_t n_tokens, bool with_classes) {
  const int64_t n_rows = batch_size * n_tokens;
  std::vector<int64_t> targets(n_rows), counted(n_rows, -7);
  const std::unique_ptr<bool[]> keep(new bool[n_rows]);
  std::vector<Real> token_weights(n_rows), weights(n_rows, Real(-7));
  const std::vector<Real> class_weights{0.5, 1, 2};
  for (int64_t i = 0; i < n_rows; ++i) {
    targets[i] = i % 5 == 3 ? -100 : i % 3;
    keep[i] = i % 7 != 2;
    token_weights[i] = Real(0.25 * (1 + i % 4));
  }
  Real n_counted = -7;
  ava::RowWeights<Real> rows{};
  rows.targets = {targets.data(), n_tokens, 1};
  rows.keep = {keep.get(), n_tokens, 1};
  rows.token_weights = {token_weights.data(), n_tokens, 1};
  if (with_classes) rows.class_weights = class_weights.data();
  rows.batch_size = batch_size;
  rows.n_tokens = n_tokens;
  rows.n_classes = 3;
  rows.ignore_index = -100;
  rows.is_mean = true;
  rows.counted_targets = counted.data();
  rows.weights = weights.data();
  rows.n_counted = &n_counted;
  ava::row_weights(rows, nullptr);

  int64_t n = 0;
  double sum = 0;
  for (int64_t i = 0; i < n_rows; ++i)
    if (targets[i] >= 0 && keep[i]) {
      ++n;
      sum += token_weights[i] * (with_classes ? class_weights[targets[i]] : 1);
    }
  EXPECT(n_counted == Real(n));
  for (int64_t i = 0; i < n_rows; ++i) {
    const bool counts = targets[i] >= 0 && keep[i];
    EXPECT(counted[i] == (counts ? targets[i] : -100));
    EXPECT_CLOSE(weights[i], counts ? token_weights[i] / sum : 0, 1e-6);
  }
}

int main() {
  cuda_emulator::under_every_schedule([&] {
    check<float>(1, 1, false);
    check<float>(3, 700, true);
    check<double>(2, 1031, false);
  });
  return expect::exit_code();
}
