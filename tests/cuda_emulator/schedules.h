// For the C++ tests of kernels: runs a check under every schedule. A report of the device counts as a failure.
#pragma once
#include <cstdio>
#include <exception>

#include "../../csrc/cuda/dialect.cuh"
#include "../cpp/expect.h"

namespace cuda_emulator {

template <class Check>
void under_every_schedule(const Check& check, int n_random = 3) {
  const auto run_under = [&](Order order, uint64_t seed) {
    options().order = order;
    options().seed = seed;
    try {
      check();
    } catch (const std::exception& error) {
      ++expect::n_failures;
      std::printf("%s\n", error.what());
    }
  };
  run_under(Order::forward, 0);
  run_under(Order::reverse, 0);
  for (int seed = 0; seed < n_random; ++seed) run_under(Order::random, seed);
  options().order = Order::forward;
}

// What the device reports about a kernel that is wrong; "" where it finds nothing.
template <class Launch>
std::string report_of(const Launch& launch) {
  try {
    launch();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace cuda_emulator

// The report holds all of these words.
#define EXPECT_REPORT(launch, ...)                                                            \
  do {                                                                                        \
    const std::string report = cuda_emulator::report_of([&] { launch; });                     \
    for (const char* part : {__VA_ARGS__})                                                    \
      if (report.find(part) == std::string::npos) {                                           \
        expect::fail(__FILE__, __LINE__, #launch);                                            \
        std::printf("    expected a report with \"%s\", got \"%s\"\n", part, report.c_str()); \
      }                                                                                       \
  } while (false)
