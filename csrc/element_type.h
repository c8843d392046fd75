// What a row may be stored in. Free of torch: the kernels of every instruction set and the C++ tests include it.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define AVA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define AVA_HOST_DEVICE inline
#endif
// Each instruction set compiles the headers under a name of its own: of an inline function with one name for all, the
// linker would keep a single copy, perhaps the AVX-512 one.
#ifndef AVA_ISA
#define AVA_ISA generic
#endif

namespace ava {

enum class ElementType { f32, bf16, f16, f64 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline namespace AVA_ISA {

AVA_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
AVA_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

AVA_HOST_DEVICE double widen(double value) { return value; }
AVA_HOST_DEVICE float widen(float value) { return value; }
AVA_HOST_DEVICE float widen(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
AVA_HOST_DEVICE float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  if (magnitude < 0x400u)
    return (sign ? -1.f : 1.f) * float(magnitude) * 5.9604644775390625e-8f;  // subnormal: times 2^-24
  return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

// to nearest, ties to even; a nan stays a nan
AVA_HOST_DEVICE void narrow(double value, double* out) { *out = value; }
AVA_HOST_DEVICE void narrow(float value, float* out) { *out = value; }
AVA_HOST_DEVICE void narrow(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(value == value ? rounded : 0x7fc0u);
}
AVA_HOST_DEVICE void narrow(float value, Float16* out) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // nan
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more rounds to inf
  } else if (magnitude < 0x38800000u) {
    // below 2^-14: adding 1/2 makes the float's own rounding cut at the subnormals' 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

}  // namespace AVA_ISA
}  // namespace ava
