// e^u of a logit, as fast as its precision allows.
//
// t = u / ln 2 = (x - reference) factor, factor = log2(e) / T. The reference is a maximum: of a warp's share of the row
// or of the row.
//
// * float32: the difference is exact or rounded once; what the product lost is known by a fused multiply-add and put
//   back, so that e^u is right to 2.5 ulp up to a gap of 80 and beyond. 8 bytes of traffic for each element leave time
//   for that.
// * 16 bits: one fused multiply-add, t = x factor - (reference factor, rounded). What that rounding adds to every t of
//   the row, `excess`, is known exactly and taken out once for the row, not for each element.
// * under a soft cap: the same, whatever the type. The cap's own error is larger than what float32 would keep. For logits
//   of 16 bits t comes straight from the logistic function that tanh is made of.
// * kCareful: the difference first and bounded below, for rows with masked or huge logits, and where a soft cap is flat.
#pragma once
#include "../softmax_rows.h"
#include "primitives.cuh"

namespace ava {

enum class Features {
  plain,   // R alone: no smoothing, no confidence penalty, no entropy
  dense,   // B, U and V too
  capped,  // dense, under a soft cap
};

constexpr float kLog2e = 1.4426950408889634f, kLog2eLow = 1.9259629e-8f, kLn2 = 0.6931471805599453f;

struct LogitScale {
  float factor, factor_low;  // log2(e) / T in two floats
  float inverse_factor;
  float lowest_difference;  // at or below it e^u is 0
  float inverse_temperature;
  float softcap, inverse_softcap, cap_factor;  // c, 1 / c, 2 log2(e) / c
};
__device__ __forceinline__ LogitScale logit_scale(const RowOptions<float>& options) {
  const float inverse_temperature = 1 / options.temperature, factor = kLog2e * inverse_temperature;
  return {factor,
          fmaf(kLog2e, inverse_temperature, -factor) + kLog2eLow * inverse_temperature,
          1 / factor,
          -200.f / factor,
          inverse_temperature,
          options.softcap,
          1 / options.softcap,
          2 * kLog2e / options.softcap};
}

// softcap(x) and a quarter of its derivative.
//
// With r = 1 / (1 + e^{2 |x| / c}), which is in [0, 1/2], tanh(|x| / c) = 1 - 2 r, and its derivative is 4 r (1 - r) / c.
// What counts here is the absolute error of c tanh, e^u has as large a relative one: with the exponent rounded twice,
// exp2_fast off by 2^-22, 1 + e rounded, and reciprocal_fast off by 2^-23, r is off by
//
//   r (1 - r) (2 |x| / c 2^-23 + 2^-22) + r (2^-24 + 2^-23) <= 2^-22.7
//
// so that c tanh is off by at most 2.5 2^-23 c: beside what a rounding of the logit to 16 bits makes of it, and of the
// result 2^-24 c itself, nothing. 1 - 2 r cancels for a small x, which only a relative error shows: see capped_maximum.
// The derivative, also where it is small, is off by 1.5 2^-22 of itself and the rounding of the exponent.
struct CappedLogit {
  float value, quarter_slope;  // the value is r where Exponent::cap says so
};
template <Features kFeatures>
__device__ __forceinline__ CappedLogit capped_logit(float logit, const LogitScale& scale) {
  if constexpr (kFeatures != Features::capped) return {logit, 0.25f};
  const float r = reciprocal_fast(1 + exp2_fast(fabsf(logit) * scale.cap_factor));
  return {copysignf(fmaf(-2 * scale.softcap, r, scale.softcap), logit), fmaf(-r, r, r)};
}
// The same value to 2 ulp, of a maximum: it is a part of lse, whose square a loss may be, and beside it the target's
// logit is measured (scalar_u in softmax_rows_sparse.cuh).
template <Features kFeatures>
__device__ __forceinline__ float capped_maximum(float logit, const LogitScale& scale) {
  return kFeatures == Features::capped ? scale.softcap * tanhf(logit * scale.inverse_softcap) : logit;
}
// Where the cap is so flat that unequal logits may have equal values: what is the maximum has to be looked at again.
__device__ __forceinline__ bool is_flat(const CappedLogit& capped) { return capped.quarter_slope < 2e-4f; }

// Logits below are masked, or so low that t e^u needs care.
constexpr float kLowestOrdinary = -1e30f;
// A reference so large that its rounding would show in e^u; or a soft cap reached, by logits that may be huge.
template <Features kFeatures>
__device__ __forceinline__ bool needs_care(float reference, const LogitScale& scale) {
  return !(fabsf(reference * scale.factor) <= 1e6f) || (kFeatures == Features::capped && reference >= scale.softcap);
}

template <class Element, Features kFeatures, bool kCareful>
struct Exponent {
  static constexpr bool kExact = kCareful || (sizeof(Element) == 4 && kFeatures != Features::capped);
  static constexpr bool kBounded = kCareful || (kExact && kFeatures == Features::plain);
  static constexpr bool kByLogistic = !kCareful && sizeof(Element) == 2 && kFeatures == Features::capped;
  const LogitScale& scale;
  float origin, offset, excess;  // origin: the reference, or how far it is from the cap

  __device__ __forceinline__ Exponent(const LogitScale& scale, float reference) : scale(scale) {
    origin = kByLogistic ? reference - scale.softcap : reference;
    offset = kExact ? 0.f : -origin * scale.factor;
    excess = kExact ? 0.f : fmaf(origin, scale.factor, offset);  // exact: it has at most 24 bits
  }
  // e^u = exponential * undo()
  __device__ __forceinline__ float undo() const { return kExact ? 1.f : exp2_fast(-excess); }

  // What `exponential` takes, for a vector of logits: the logits, or their capped values, where a masked logit stays -inf.
  //
  // kByLogistic: not c tanh(x / c) but r = 1 / (1 + e^{2 x / c}), since the first is c - 2 c r. Special functions are what
  // takes longest under a cap, so two logits share a reciprocal: 1 / a = b / (a b). That cannot overflow while the maximum
  // is below the cap. (A nan reaches its neighbour, as it does the whole row.) With two roundings more, and an r of up to
  // 1, c tanh is off by at most 6.5 2^-23 c. The derivative needs 1 - r, which is e^{2 x / c} r and does not cancel.
  __device__ __forceinline__ void cap(const float* logits, CappedLogit* capped) const {  // [kVectorSize]
#pragma unroll
    for (int k = 0; k < kVectorSize<Element>; k += 2) cap_two(logits + k, capped + k);
  }
  __device__ __forceinline__ void cap_two(const float* logits, CappedLogit* capped) const {
    if constexpr (kByLogistic) {
      const float e0 = exp2_fast(logits[0] * scale.cap_factor), e1 = exp2_fast(logits[1] * scale.cap_factor);
      const float of_both = reciprocal_fast((1 + e0) * (1 + e1));
      const float r0 = of_both * (1 + e1), r1 = of_both * (1 + e0);
      capped[0] = {r0, e0 * r0 * r0};
      capped[1] = {r1, e1 * r1 * r1};
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        capped[k] = capped_logit<kFeatures>(logits[k], scale);
        if (kFeatures == Features::capped && kCareful && logits[k] == -INFINITY) capped[k].value = logits[k];
      }
    }
  }

  // What has the maximum's place while the sums are taken, so that no loop has to ask where that is: a logit whose e^u is
  // 0, a masked one where those are looked for or do no harm. kStandInCounts: a soft cap or the range of the type leaves
  // no room for that. Then it is as low as a logit can be, so that nothing is lost when its e^u is taken out again.
  static constexpr bool kIsHalf = std::is_same<Element, __half>::value;
  static constexpr bool kStandInCounts =
      !kCareful && (kFeatures == Features::capped || (kFeatures == Features::dense && kIsHalf));
  __device__ __forceinline__ Element stand_in(float max) const {
    float low = -INFINITY;
    if constexpr (!kCareful && kFeatures == Features::capped) low = -16 * scale.softcap;
    if constexpr (!kCareful && kFeatures == Features::dense) low = fmaf(2.f, fminf(max, 0.f), scale.lowest_difference);
    if constexpr (kStandInCounts) low = fmaxf(low, kIsHalf ? -65504.f : kLowestOrdinary);
    return from_float<Element>(low);
  }

  __device__ __forceinline__ float exponential(float x, float& steps) const {
    if constexpr (!kExact) {
      steps = fmaf(x, kByLogistic ? -2 * scale.softcap * scale.factor : scale.factor, offset);
      return exp2_fast(steps);
    }
    float difference = x - origin;
    if constexpr (kBounded) difference = max_keep_nan(difference, scale.lowest_difference);
    steps = difference * scale.factor;
    if constexpr (kFeatures == Features::capped) return exp2_fast(steps);
    const float lost = fmaf(difference, scale.factor_low, fmaf(difference, scale.factor, -steps));
    const float e = exp2_fast(steps);
    return fmaf(e, lost * kLn2, e);
  }
  // What U adds up, for all columns alike: logits, or differences where logits might overflow.
  __device__ __forceinline__ float summand(float x) const { return kExact ? x - origin : x; }
  __device__ __forceinline__ float sum_of_u(float sum, float count) const {
    if constexpr (kByLogistic) sum *= -2 * scale.softcap;
    return (kExact ? sum : fmaf(-origin, count, sum)) * scale.inverse_temperature;
  }
};

// body(std::bool_constant<careful>()), compiled only for what can come. Plain float32 rows bound every difference
// anyway.
template <class Element, Features kFeatures, class Body>
__device__ __forceinline__ auto with_care(bool careful, Body body) {
  if constexpr (kFeatures == Features::plain && sizeof(Element) == 4)
    return body(std::false_type());
  else
    return careful ? body(std::true_type()) : body(std::false_type());
}

}  // namespace ava
