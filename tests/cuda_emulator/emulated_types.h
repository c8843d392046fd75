// CUDA's keywords and types for g++.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

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
inline __half2 __lowhigh2highlow(__half2 pair) { return {pair.y, pair.x}; }
inline __nv_bfloat162 __lowhigh2highlow(__nv_bfloat162 pair) { return {pair.y, pair.x}; }

// 16 bits of ones for each half that compares so, else zeros.
template <class Compare>
unsigned halves(Compare compare, float a, float b, float c, float d) {
  return (compare(a, b) ? 0xffffu : 0) | (compare(c, d) ? 0xffff0000u : 0);
}
inline unsigned __hge2_mask(__half2 a, __half2 b) {
  return halves(std::greater_equal<>(), __half2float(a.x), __half2float(b.x), __half2float(a.y), __half2float(b.y));
}
inline unsigned __hge2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  return halves(std::greater_equal<>(), __bfloat162float(a.x), __bfloat162float(b.x), __bfloat162float(a.y),
                __bfloat162float(b.y));
}
inline unsigned __heq2_mask(__half2 a, __half2 b) {
  return halves(std::equal_to<>(), __half2float(a.x), __half2float(b.x), __half2float(a.y), __half2float(b.y));
}
inline unsigned __heq2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  return halves(std::equal_to<>(), __bfloat162float(a.x), __bfloat162float(b.x), __bfloat162float(a.y),
                __bfloat162float(b.y));
}
