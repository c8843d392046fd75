// The kernel that uses the whole dialect. tests/test_cuda_mutants.py runs it with parts of the kernel broken.
#include "kernels/row_sum.cuh"

#include <memory>
#include <vector>

#include "schedules.h"

template <class Element>
static void test_sums(int n_columns) {
  constexpr int n_rows = 7;  // the phases of the mbarriers turn
  // not one element more than the kernel may touch, so that AddressSanitizer sees the next one
  std::vector<Element> rows(n_rows * n_columns);
  std::vector<double> expected(n_rows, 0.0);
  for (int i = 0; i < n_rows * n_columns; ++i) {
    const float value = float(i % 7 - 2);
    rows[i] = ava::from_float<Element>(value);
    expected[i / n_columns] += value;
  }
  cuda_emulator::under_every_schedule([&] {
    const auto sums = std::make_unique<float[]>(n_rows);
    ava::row_sum<Element>(rows.data(), sums.get(), n_rows, n_columns, nullptr);
    for (int row = 0; row < n_rows; ++row) EXPECT_CLOSE(sums[row], expected[row], 0);
  });
}

int main() {
  test_sums<float>(2048);
  test_sums<__half>(2048);
  test_sums<__nv_bfloat16>(2056);  // the last vectors belong to a few threads only
  return expect::exit_code();
}
