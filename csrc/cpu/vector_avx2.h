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
  static Register load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static void store(float* p, Register v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Register v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Register v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  struct Pair {
    Register first, second;
  };
  static Pair load_pair(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000)))};
  }
  template <class Element>
  static Pair load_pair(const Element* p) {
    return {load(p), load(p + kLanes)};
  }
  static void store_pair(BFloat16* p, Pair v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pair(v)); }
  template <class Element>
  static void store_pair(Element* p, Pair v) {
    store(p, v.first), store(p + kLanes, v.second);
  }
  static void stream_pair(float* p, Pair v) { _mm256_stream_ps(p, v.first), _mm256_stream_ps(p + kLanes, v.second); }
  static void stream_pair(BFloat16* p, Pair v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(v)); }
  static void stream_pair(Float16* p, Pair v) { store_pair(p, v); }
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
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(magic));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
  }

 private:
  static __m256i round_bf16(Register v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));  // one of all ones would overflow
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  static __m128i narrow_bf16(Register v) {
    const __m256i upper = _mm256_srli_epi32(round_bf16(v), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
  static __m256i narrow_pair(Pair v) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(v.first), 16), round_bf16(v.second), 0xaa);
  }
};

}  // namespace AVA_ISA
}  // namespace ava
