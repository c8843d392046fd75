// 16 floats in an AVX-512 register: the operations the row kernels are written in.
#pragma once
#include <immintrin.h>

#include "../element_type.h"

namespace ava {
inline namespace AVA_ISA {

struct VectorFloat {
  using Value = float;
  using Register = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  static Register set(float value) { return _mm512_set1_ps(value); }
  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static Register load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Register load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static void store(float* p, Register v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Register v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Register v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  // 2 kLanes elements in an order of its own, the same for load and store: halves of 32 bits need no shuffle
  struct Pair {
    Register first, second;
  };
  static Pair load_pair(const BFloat16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)))};
  }
  template <class Element>
  static Pair load_pair(const Element* p) {
    return {load(p), load(p + kLanes)};
  }
  static void store_pair(BFloat16* p, Pair v) { _mm512_storeu_si512(p, narrow_pair(v)); }
  template <class Element>
  static void store_pair(Element* p, Pair v) {
    store(p, v.first), store(p + kLanes, v.second);
  }
  // past the caches; p is aligned to 64 bytes
  static void stream_pair(float* p, Pair v) { _mm512_stream_ps(p, v.first), _mm512_stream_ps(p + kLanes, v.second); }
  static void stream_pair(BFloat16* p, Pair v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(v)); }
  static void stream_pair(Float16* p, Pair v) { store_pair(p, v); }
  static void end_of_stream() { _mm_sfence(); }
  static void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T1); }

  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register sub(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static Register mul(Register a, Register b) { return _mm512_mul_ps(a, b); }
  static Register div(Register a, Register b) { return _mm512_div_ps(a, b); }
  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
  static Register fnma(Register a, Register b, Register c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static Register max(Register a, Register b) { return _mm512_max_ps(a, b); }  // b where either is nan
  static Register abs(Register a) { return _mm512_abs_ps(a); }
  static Register copy_sign(Register magnitude, Register sign) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(0x7fffffff), _mm512_castps_si512(magnitude),
                                                         _mm512_castps_si512(sign), 0xca));
  }
  static Mask not_equal(Register a, Register b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }  // true for nan
  static Mask less(Register a, Register b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static bool any_equal(Register a, Register b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0; }
  static Register keep(Mask mask, Register a) { return _mm512_maskz_mov_ps(mask, a); }  // 0 elsewhere
  static Register select(Mask mask, Register yes, Register no) { return _mm512_mask_blend_ps(mask, no, yes); }
  static float largest(Register a) { return _mm512_reduce_max_ps(a); }
  static float total(Register a) { return _mm512_reduce_add_ps(a); }

  // e^{d factor ln 2} = 2^floor(t) 2^f, t = d factor, f = t - floor(t) in [0, 1), the second by a polynomial of degree
  // 5. Relative error 1.5e-7, none at d = 0, and |t| 4.1e-8 from rounding t. Exact for -inf, a nan stays one.
  static Register exponential(Register d, Register factor) {
    const Register t = mul(d, factor), f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Register p = fma(set(0.0018671300495043397f), f, set(0.009017030708491802f));
    p = fma(p, f, set(0.05579991266131401f));
    p = fma(p, f, set(0.24016444385051727f));
    p = fma(p, f, set(0.6931512951850891f));
    p = fma(p, f, set(1.f));
    return _mm512_scalef_ps(p, t);  // takes the floor itself
  }

 private:
  // The rounded value's upper half, to nearest even. A nan becomes the usual one: that of all ones, which GPUs give, would
  // overflow.
  static __m512i round_bf16(Register v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  }
  static __m256i narrow_bf16(Register v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16)); }
  static __m512i narrow_pair(Pair v) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(round_bf16(v.first), 16), round_bf16(v.second));
  }
};

}  // namespace AVA_ISA
}  // namespace ava
