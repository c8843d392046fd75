// Checks for the C++ tests of the headers: a failed one prints its place and both values, and the test goes on.
//
//   #include "expect.h"
//   int main() {
//     EXPECT(std::isnan(x));
//     EXPECT_CLOSE(x, 0.5, 1e-6);  // |x - 0.5| <= 1e-6 |0.5|; nan is close to nan, inf to itself
//     return expect::exit_code();
//   }
#pragma once
#include <cmath>
#include <cstdio>

namespace expect {

inline int n_failures = 0;

inline void fail(const char* file, int line, const char* text) {
  ++n_failures;
  std::printf("%s:%d: %s\n", file, line, text);
}

inline bool is_close(double value, double expected, double relative) {
  if (std::isnan(expected)) return std::isnan(value);
  if (std::isinf(expected)) return value == expected;
  return std::fabs(value - expected) <= relative * std::fabs(expected);
}

inline void close(double value, double expected, double relative, const char* file, int line, const char* text) {
  if (is_close(value, expected, relative)) return;
  fail(file, line, text);
  std::printf("    got %.17g, expected %.17g within %.3g\n", value, expected, relative);
}

inline int exit_code() {
  if (n_failures) std::printf("%d failed\n", n_failures);
  return n_failures != 0;  // the count itself would be taken modulo 256
}

}  // namespace expect

#define EXPECT(condition) \
  if (!(condition)) expect::fail(__FILE__, __LINE__, #condition)
#define EXPECT_CLOSE(value, expected, relative) \
  expect::close(value, expected, relative, __FILE__, __LINE__, #value " close to " #expected)
