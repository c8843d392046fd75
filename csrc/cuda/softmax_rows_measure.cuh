// Sums over vectors of logits, the statistics that they make, and the gradient of a vector.
#pragma once
#include "softmax_rows_exponent.cuh"

namespace ava {

constexpr int kNoColumn = INT32_MAX;

// Sums of e, t e, and u in the exponent's units; without the maximum's e.
struct Sums {
  float rest = 0, weighted = 0, sum = 0;
  int count = 0;
};

// One vector. `excluded` is the place of the maximum in it, or -1. Under a soft cap several logits may be equal to the
// reference: `argmax` becomes the lowest column of those (R is the same whichever of them is left out).
template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ void accumulate(const float* logits,  // [kVectorSize]
                                           int first_column, int excluded,
                                           const Exponent<Element, kFeatures, kCareful>& exponent, Sums& sums,
                                           int& argmax) {
  constexpr int kSize = kVectorSize<Element>;
  float rest[kSize], weighted = 0, sum = 0;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const float x = capped_logit<kFeatures>(logits[k], exponent.scale).value;
    if constexpr (kFeatures == Features::capped)
      if (x == exponent.reference && first_column + k < argmax) argmax = first_column + k;
    float steps, e = exponent.exponential(x, steps);
    e = k == excluded ? 0.f : e;
    rest[k] = e;
    if constexpr (kFeatures != Features::plain) {
      weighted = fmaf(steps, e, weighted);
      if (!kCareful || x != -INFINITY) {
        sum += exponent.summand(x, steps);
        sums.count++;
      }
    }
  }
#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2)
#pragma unroll
    for (int k = 0; k < width; ++k) rest[k] += rest[k + width];
  sums.rest += rest[0];
  sums.weighted += weighted;
  sums.sum += sum;
}

// Takes the rounding of the reference back out of the sums.
template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ RowStatistics<float> to_statistics(const Sums& sums,
                                                              const Exponent<Element, kFeatures, kCareful>& exponent,
                                                              float max, int argmax) {
  const float undo = exponent.undo(), column = argmax == kNoColumn ? -1.f : float(argmax);
  if constexpr (kFeatures == Features::plain) return {max, column, sums.rest * undo, 0.f, 0.f, 0.f};
  const float count = float(sums.count);
  return {max,
          column,
          sums.rest * undo,
          (sums.weighted - exponent.excess * sums.rest) * undo * kLn2,
          exponent.sum_of_u(sums.sum, count),
          count};
}

// Place of the first element with this value.
template <class Element>
__device__ __forceinline__ int first_equal(const float* logits, float value) {
  int found = 0;
#pragma unroll
  for (int k = kVectorSize<Element> - 1; k >= 0; --k) found = logits[k] == value ? k : found;
  return found;
}

// dense_gradient of softmax_rows.h for this exponent: e (factor + slope t) + constant
struct GradientScalars {
  float factor, slope, constant;
};
template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ GradientScalars gradient_scalars(const DenseGradient<float>& dense,
                                                            const Exponent<Element, kFeatures, kCareful>& exponent) {
  const float undo = exponent.undo(), slope = dense.slope / exponent.scale.factor;
  return {(dense.factor - slope * exponent.excess) * undo, slope * undo, dense.constant};
}

template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ uint4 gradient_vector(uint4 logits, const GradientScalars& row,
                                                 const Exponent<Element, kFeatures, kCareful>& exponent) {
  float values[kVectorSize<Element>];
  unpack<Element>(logits, values);
#pragma unroll
  for (int k = 0; k < kVectorSize<Element>; ++k) {
    const CappedLogit x = capped_logit<kFeatures>(values[k], exponent.scale);
    float steps;
    const float e = exponent.exponential(x.value, steps);
    float gradient = e * row.factor;
    if constexpr (kFeatures != Features::plain) gradient = fmaf(e, fmaf(steps, row.slope, row.factor), row.constant);
    if constexpr (kFeatures == Features::capped) gradient *= x.slope;
    if constexpr (kFeatures != Features::plain && kCareful) gradient = x.value == -INFINITY ? 0.f : gradient;
    values[k] = gradient;
  }
  return pack<Element>(values);
}

template <class Real>
__device__ __forceinline__ RowStatistics<Real> merge_lanes(RowStatistics<Real> mine, Real inverse_temperature) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const RowStatistics<Real> other{
        __shfl_xor_sync(kWholeWarp, mine.max, offset),  __shfl_xor_sync(kWholeWarp, mine.argmax, offset),
        __shfl_xor_sync(kWholeWarp, mine.rest, offset), __shfl_xor_sync(kWholeWarp, mine.weighted, offset),
        __shfl_xor_sync(kWholeWarp, mine.sum, offset),  __shfl_xor_sync(kWholeWarp, mine.count, offset)};
    mine = merge(mine, other, inverse_temperature);
  }
  return mine;
}

// What operators call statistics: as merged, but for rows of nothing and of infinities.
template <class Real>
__device__ __forceinline__ RowStatistics<Real> finished(RowStatistics<Real> row, bool is_dense) {
  if (row.max == Real(-INFINITY)) {  // nothing but masked columns: left out; or nan, which must not be hidden
    const Real rest = row.rest;
    row = empty_statistics<Real>();
    if (rest != rest) row.rest = row.max = rest, row.count = 1;
    return row;
  }
  if (row.max == Real(INFINITY)) row.rest = Real(NAN);  // +inf logits give nan, as in torch
  if (!is_dense) row.weighted = row.sum = 0, row.count = 1;
  return row;
}

}  // namespace ava
