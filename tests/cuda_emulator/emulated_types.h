// CUDA's keywords and types for g++.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../csrc/element_type.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

// 16-bit numbers, rounded as tests/cpp/test_softmax_rows.cpp expects
struct __half {
  ava::Float16 number;
};
struct __nv_bfloat16 {
  ava::BFloat16 number;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half value) { return ava::widen(value.number); }
inline float __bfloat162float(__nv_bfloat16 value) { return ava::widen(value.number); }
inline __half __float2half_rn(float value) {
  __half result;
  ava::narrow(value, &result.number);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 result;
  ava::narrow(value, &result.number);
  return result;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }

// Both halves of a sum; every nan is the same one.
inline __half __hadd(__half x, __half y) {
  const float sum = __half2float(x) + __half2float(y);
  __half result = __float2half_rn(sum);
  if (sum != sum) result.number.bits = 0x7fff;
  return result;
}
inline __nv_bfloat16 __hadd(__nv_bfloat16 x, __nv_bfloat16 y) {
  const float sum = __bfloat162float(x) + __bfloat162float(y);
  __nv_bfloat16 result = __float2bfloat16_rn(sum);
  if (sum != sum) result.number.bits = 0x7fff;
  return result;
}
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }

// The larger and the smaller of each half; a nan loses.
inline __half larger(__half x, __half y) {
  const float a = __half2float(x), b = __half2float(y);
  return b != b || a >= b ? x : y;
}
inline __half smaller(__half x, __half y) {
  const float a = __half2float(x), b = __half2float(y);
  return b != b || a <= b ? x : y;
}
inline __nv_bfloat16 larger(__nv_bfloat16 x, __nv_bfloat16 y) {
  const float a = __bfloat162float(x), b = __bfloat162float(y);
  return b != b || a >= b ? x : y;
}
inline __nv_bfloat16 smaller(__nv_bfloat16 x, __nv_bfloat16 y) {
  const float a = __bfloat162float(x), b = __bfloat162float(y);
  return b != b || a <= b ? x : y;
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {larger(a.x, b.x), larger(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {smaller(a.x, b.x), smaller(a.y, b.y)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) { return {larger(a.x, b.x), larger(a.y, b.y)}; }
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) { return {smaller(a.x, b.x), smaller(a.y, b.y)}; }
