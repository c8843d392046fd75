// Four floats in the compiler's own vector type (SSE2, NEON, or what the target has). See vector_avx512.h for the contracts.
#pragma once
#include "../element_type.h"

namespace ava {
inline namespace AVA_ISA {

struct VectorFloat {
  using Value = float;
  static constexpr int kLanes = 4;
  typedef float Register __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));  // -1 where true
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

  static Register set(float value) { return Register{value, value, value, value}; }
  static Register load(const float* p) {
    Register v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Register v) { __builtin_memcpy(p, &v, sizeof v); }
  template <class Element>
  static Register load(const Element* p) {
    return Register{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  template <class Element>
  static void store(Element* p, Register v) {
    for (int lane = 0; lane < kLanes; ++lane) narrow(v[lane], p + lane);
  }
  template <class Element>
  static void store_pair(Element* p, Register first, Register second) {
    store(p, first), store(p + kLanes, second);
  }
  template <class Element>
  static void stream_pair(Element* p, Register first, Register second) {
    store_pair(p, first, second);
  }
  static void end_of_stream() {}
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

  static Register add(Register a, Register b) { return a + b; }
  static Register sub(Register a, Register b) { return a - b; }
  static Register mul(Register a, Register b) { return a * b; }
  static Register div(Register a, Register b) { return a / b; }
  static Register fma(Register a, Register b, Register c) { return a * b + c; }
  static Register fnma(Register a, Register b, Register c) { return c - a * b; }
  static Register max(Register a, Register b) { return a > b ? a : b; }
  static Register abs(Register a) { return Register(Bits(a) & 0x7fffffffu); }
  static Register copy_sign(Register magnitude, Register sign) {
    return Register((Bits(magnitude) & 0x7fffffffu) | (Bits(sign) & 0x80000000u));
  }
  static Mask not_equal(Register a, Register b) { return a != b; }
  static Mask less(Register a, Register b) { return a < b; }
  static bool any_equal(Register a, Register b) { return any(a == b); }
  static bool any_greater(Register a, Register b) { return any(a > b); }
  static Register keep(Mask mask, Register a) { return Register(mask & Mask(a)); }
  static Register select(Mask mask, Register yes, Register no) { return mask ? yes : no; }
  static float largest(Register a) {
    float best = a[0];
    for (int lane = 1; lane < kLanes; ++lane) best = a[lane] > best ? a[lane] : best;
    return best;
  }
  static float total(Register a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  static Register scale_by_power(Register p, Register, Register shifted) {
    const Mask whole = Mask(shifted) - Mask(set(12582912.f));
    return p * Register((whole + 127) << 23);
  }
  static constexpr float kSmallestPower = -127;

 private:
  static bool any(Mask mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
};

}  // namespace AVA_ISA
}  // namespace ava
