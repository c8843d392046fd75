// 8 floats in an AVX2 register: the operations the row kernels are written in. See vector_avx512.h for their contracts.
#pragma once
#include <immintrin.h>

#include "../element_type.h"

namespace ava {
inline namespace AVA_ISA {

struct VectorFloat {
  using Value = float;
  using Register = __m256;
  using Mask = __m256;
  static constexpr int kLanes = 8;

  static Register set(float value) { return _mm256_set1_ps(value); }
  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static Register load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Register load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static void store(float* p, Register v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Register v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Register v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class Element>
  static void store_pair(Element* p, Register first, Register second) {
    store(p, first), store(p + kLanes, second);
  }
  static void stream_pair(float* p, Register first, Register second) {
    _mm256_stream_ps(p, first), _mm256_stream_ps(p + kLanes, second);
  }
  static void stream_pair(Float16* p, Register first, Register second) { store_pair(p, first, second); }
  static void stream_pair(BFloat16* p, Register first, Register second) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(narrow_bf16(second), narrow_bf16(first)));
  }
  static void end_of_stream() { _mm_sfence(); }
  static void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T1); }

  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static Register sub(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static Register mul(Register a, Register b) { return _mm256_mul_ps(a, b); }
  static Register div(Register a, Register b) { return _mm256_div_ps(a, b); }
  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static Register fnma(Register a, Register b, Register c) { return _mm256_fnmadd_ps(a, b, c); }
  static Register max(Register a, Register b) { return _mm256_max_ps(a, b); }
  static Register abs(Register a) { return _mm256_andnot_ps(set(-0.f), a); }
  static Register copy_sign(Register magnitude, Register sign) {
    return _mm256_or_ps(_mm256_andnot_ps(set(-0.f), magnitude), _mm256_and_ps(set(-0.f), sign));
  }
  static Mask not_equal(Register a, Register b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
  static Mask less(Register a, Register b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static bool any_equal(Register a, Register b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) != 0; }
  static bool any_greater(Register a, Register b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
  static Register keep(Mask mask, Register a) { return _mm256_and_ps(mask, a); }
  static Register select(Mask mask, Register yes, Register no) { return _mm256_blendv_ps(no, yes, mask); }
  static float largest(Register a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static float total(Register a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // n is also in the low bits of `shifted`; at -127 the exponent field becomes 0 and so does the product
  static Register scale_by_power(Register p, Register, Register shifted) {
    const __m256i whole = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(set(12582912.f)));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23)));
  }
  static constexpr float kSmallestPower = -127;

 private:
  static __m128i narrow_bf16(Register v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i upper = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
};

}  // namespace AVA_ISA
}  // namespace ava
