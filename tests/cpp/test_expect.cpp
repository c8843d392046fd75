// The checks themselves: one that cannot fail would let every other test pass.
#include "expect.h"

#include <limits>

int main() {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();

  EXPECT(1 + 1 == 3);
  EXPECT_CLOSE(1.001, 1.0, 1e-4);
  EXPECT_CLOSE(1e-30, 0.0, 1e-4);
  EXPECT_CLOSE(nan, 1.0, 1e-4);
  EXPECT_CLOSE(1.0, nan, 1e-4);
  EXPECT_CLOSE(inf, 1.0, 1e-4);
  EXPECT_CLOSE(-inf, inf, 1e-4);
  std::printf("the seven failures above are expected\n");
  const bool all_failed = expect::n_failures == 7 && expect::exit_code() == 1;

  expect::n_failures = 0;
  EXPECT(all_failed);
  EXPECT_CLOSE(1.00001, 1.0, 1e-4);
  EXPECT_CLOSE(0.0, 0.0, 0);
  EXPECT_CLOSE(nan, nan, 0);
  EXPECT_CLOSE(-inf, -inf, 0);
  return expect::exit_code();
}
