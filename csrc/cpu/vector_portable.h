// Four floats in the compiler's own vector type (SSE2, NEON, or what the target has). See vector_avx512.h for the
// contracts.
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

  struct Pair {
    Register first, second;
  };
  template <class Element>
  static Pair load_pair(const Element* p) {
    return {load(p), load(p + kLanes)};
  }
  template <class Element>
  static void store_pair(Element* p, Pair v) {
    store(p, v.first), store(p + kLanes, v.second);
  }
  template <class Element>
  static void stream_pair(Element* p, Pair v) {
    store_pair(p, v);
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
  static Register keep(Mask mask, Register a) { return Register(mask & Mask(a)); }
  static Register select(Mask mask, Register yes, Register no) { return mask ? yes : no; }
  static float largest(Register a) {
    float best = a[0];
    for (int lane = 1; lane < kLanes; ++lane) best = a[lane] > best ? a[lane] : best;
    return best;
  }
  static float total(Register a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  // e^{d factor ln 2}: 2^n p(f), n = round(d factor), |f| <= 1/2, p of degree 5 (relative error 2.4e-7). 0 from 2^-127
  // down; a nan stays one.
  static Register exponential(Register d, Register factor) {
    const Register magic = set(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    const Register t = max(set(-127.f), mul(d, factor)), shifted = add(t, magic), f = sub(t, sub(shifted, magic));
    Register p = fma(set(0.0013276472454890609f), f, set(0.009675540961325169f));
    p = fma(p, f, set(0.05550713092088699f));
    p = fma(p, f, set(0.24022120237350464f));
    p = fma(p, f, set(0.6931469440460205f));
    p = fma(p, f, set(1.f));
    const Mask n = Mask(shifted) - Mask(magic);
    return p * Register((n + 127) << 23);
  }

 private:
  static bool any(Mask mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
};

}  // namespace AVA_ISA
}  // namespace ava
