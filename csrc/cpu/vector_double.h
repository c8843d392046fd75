// One double, behind the same operations: float64 rows run through the text of the float kernels, which is how
// gradcheck reaches their formulas. Speed is not the point.
#pragma once
#include <math.h>

#include "../element_type.h"

namespace ava {
inline namespace AVA_ISA {

struct VectorDouble {
  using Value = double;
  using Register = double;
  using Mask = bool;
  static constexpr int kLanes = 1;

  static Register set(double value) { return value; }
  static Register load(const double* p) { return *p; }
  static void store(double* p, Register v) { *p = v; }
  struct Pair {
    Register first, second;
  };
  static Pair load_pair(const double* p) { return {p[0], p[1]}; }
  static void store_pair(double* p, Pair v) { p[0] = v.first, p[1] = v.second; }
  static void stream_pair(double* p, Pair v) { store_pair(p, v); }
  static void end_of_stream() {}
  static void prefetch(const void*) {}

  static Register add(Register a, Register b) { return a + b; }
  static Register sub(Register a, Register b) { return a - b; }
  static Register mul(Register a, Register b) { return a * b; }
  static Register fma(Register a, Register b, Register c) { return a * b + c; }
  static Register max(Register a, Register b) { return a > b ? a : b; }
  static Mask not_equal(Register a, Register b) { return a != b; }
  static Mask less(Register a, Register b) { return a < b; }
  static bool any_equal(Register a, Register b) { return a == b; }
  static Register keep(Mask mask, Register a) { return mask ? a : 0; }
  static Register select(Mask mask, Register yes, Register no) { return mask ? yes : no; }
  static double largest(Register a) { return a; }
  static double total(Register a) { return a; }
  static Register exponential(Register d, Register factor) { return exp(d * factor); }
};

}  // namespace AVA_ISA
}  // namespace ava
