// Four floats in the compiler's own vector type (SSE2, NEON, or what the target has). See vector_avx512.h for the
// contracts.
#pragma once
#ifdef __aarch64__
#include <arm_neon.h>
#endif
#include "../element_type.h"

namespace ava {
inline namespace AVA_ISA {

struct VectorFloat {
  using Value = float;
  static constexpr int kLanes = 4;
  typedef float Register __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));  // -1 where true
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

  static Register set(float value) { return Register{value, value, value, value}; }
  static Register load(const float* p) {
    Register v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Register v) { __builtin_memcpy(p, &v, sizeof v); }
  static Register load(const BFloat16* p) { return Register(load_halves(p) << 16); }
  static Register load(const Float16* p) { return widened(load_halves(p)); }
  static void store(BFloat16* p, Register v) { store_halves(p, rounded_bf16(v) >> 16); }
  static void store(Float16* p, Register v) { store_halves(p, narrowed(v)); }

  struct Pair {
    Register first, second;
  };
  static Pair load_pair(const BFloat16* p) {
    Bits bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return {Register(bits << 16), Register(bits & 0xffff0000u)};
  }
  template <class Element>
  static Pair load_pair(const Element* p) {
    return {load(p), load(p + kLanes)};
  }
  static void store_pair(BFloat16* p, Pair v) {
    const Bits bits = rounded_bf16(v.first) >> 16 | (rounded_bf16(v.second) & 0xffff0000u);
    __builtin_memcpy(p, &bits, sizeof bits);
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
  // down; a nan stays one. GCC left it a function of its own, which saves its registers around every call.
  [[gnu::always_inline]] static Register exponential(Register d, Register factor) {
    const Register magic = set(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    const Register t = max(set(-127.f), mul(d, factor)), shifted = add(t, magic), f = sub(t, sub(shifted, magic));
    Register p = fma(set(0.0013276472454890609f), f, set(0.009675540961325169f));
    p = fma(p, f, set(0.05550713092088699f));
    p = fma(p, f, set(0.24022120237350464f));
    p = fma(p, f, set(0.6931469440460205f));
    p = fma(p, f, set(1.f));
    const Bits n = Bits(shifted) - Bits(magic);
    return p * Register((n + 127u) << 23);
  }

 private:
  static bool any(Mask mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
  static void store_halves(void* p, Bits v) {
    const Halves halves = __builtin_convertvector(v, Halves);
    __builtin_memcpy(p, &halves, sizeof halves);
  }
#ifdef __aarch64__
  // by name: GCC takes __builtin_convertvector from 8 to 16 bytes apart, lane by lane
  template <class Half>
  static Bits load_halves(const Half* p) {
    return Bits(vmovl_u16(vld1_u16(&p->bits)));
  }
  static Register widened(Bits halves) { return Register(vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(halves)))); }
  static Bits narrowed(Register v) { return Bits(vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(v)))); }
#else
  static Bits load_halves(const void* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, Bits);
  }
  // widen() and narrow() of element_type.h without their branches. SSE2 compares signed numbers only
  static Register widened(Bits halves) {
    const Bits magnitude = halves & 0x7fffu, normal = (magnitude << 13) + (112u << 23);
    const Bits inf_or_nan = Bits(Mask(magnitude) >= 0x7c00) & (112u << 23);
    const Register subnormal = Register(normal + (1u << 23)) - 6.103515625e-5f;  // 2^-14
    const Bits positive = Mask(magnitude) < 0x400 ? Bits(subnormal) : normal + inf_or_nan;
    return Register(positive | (halves & 0x8000u) << 16);
  }
  static Bits narrowed(Register v) {
    const Bits bits = Bits(v), magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const Bits subnormal = Bits(Register(magnitude) + 0.5f) - 0x3f000000u;
    const Bits inf_or_nan = 0x7c00u + (Bits(Mask(magnitude) > 0x7f800000) & 0x200u);
    const Bits finite = Mask(magnitude) < 0x38800000 ? subnormal : normal;
    return (Mask(magnitude) >= 0x477ff000 ? inf_or_nan : finite) | (bits >> 16 & 0x8000u);
  }
#endif
  static Bits rounded_bf16(Register v) {  // in the upper half; a nan of all ones would overflow
    const Bits bits = Bits(v);
    return v == v ? bits + 0x7fffu + (bits >> 16 & 1u) : Bits{} + 0x7fc00000u;
  }
};

}  // namespace AVA_ISA
}  // namespace ava
