// Sums over vectors of logits, the statistics that they make, and the gradient of a vector.
#pragma once
#include "softmax_rows_exponent.cuh"
#include "softmax_rows_slice.cuh"

namespace ava {

constexpr int kNoColumn = INT32_MAX;

// Vectors of one thread that are summed side by side. Of float32, two come to no more than one of 16 bits.
template <class Element, Features kFeatures>
constexpr int kSlotsAtOnce = sizeof(Element) == 4 ? 1 : 2;

// Sums of e, t e, and u in the exponent's units; without the maximum's e.
struct Sums {
  float rest = 0, weighted = 0, sum = 0;
  int count = 0;
};

// One vector. `excluded` is the place of the maximum in it, or -1; only vectors that may have one are compared with it.
// Where a soft cap is flat several logits may be equal to the reference: `argmax` becomes the lowest column of those (R is
// the same whichever of them is left out).
template <bool kExcludes, class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ void accumulate(const float* logits,  // [kVectorSize]
                                           int first_column, int excluded,
                                           const Exponent<Element, kFeatures, kCareful>& exponent, Sums& sums,
                                           int& argmax) {
  constexpr int kSize = kVectorSize<Element>;
  float rest[kSize], weighted = 0, sum = 0;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const float x = capped_logit_or_masked<kFeatures, kCareful>(logits[k], exponent.scale).value;
    if constexpr (kFeatures == Features::capped && kCareful)
      if (x == exponent.reference && first_column + k < argmax) argmax = first_column + k;
    float steps, e = exponent.exponential(x, steps);
    if constexpr (kExcludes) e = k == excluded ? 0.f : e;
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
  constexpr float kOfSlope = kFeatures == Features::capped ? 4.f : 1.f;  // whose quarter is there
  return {(dense.factor - slope * exponent.excess) * undo * kOfSlope, slope * undo * kOfSlope,
          dense.constant * kOfSlope};
}

template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ uint4 gradient_vector(uint4 logits, const GradientScalars& row,
                                                 const Exponent<Element, kFeatures, kCareful>& exponent) {
  float values[kVectorSize<Element>];
  unpack<Element>(logits, values);
#pragma unroll
  for (int k = 0; k < kVectorSize<Element>; ++k) {
    const CappedLogit x = capped_logit_or_masked<kFeatures, kCareful>(values[k], exponent.scale);
    float steps;
    const float e = exponent.exponential(x.value, steps);
    float gradient = e * row.factor;
    if constexpr (kFeatures != Features::plain) gradient = fmaf(e, fmaf(steps, row.slope, row.factor), row.constant);
    if constexpr (kFeatures == Features::capped) gradient *= x.quarter_slope;
    if constexpr (kFeatures != Features::plain && kCareful) gradient = x.value == -INFINITY ? 0.f : gradient;
    values[k] = gradient;
  }
  return pack<Element>(values);
}

// By the largest maximum first, so that every lane needs one exponential and the rest is plain sums.
template <bool kDense = true, class Real>
__device__ __forceinline__ RowStatistics<Real> merge_lanes(const RowStatistics<Real>& mine, Real inverse_temperature) {
  const Real max = warp_max(mine.max), argmax = -warp_max(mine.max == max ? -mine.argmax : Real(-INFINITY));
  const bool wins = mine.max == max && mine.argmax == argmax;
  RowStatistics<Real> row = below(mine, max, inverse_temperature);
  if (wins) row = mine;
  row.max = max;
  row.argmax = argmax;
  row.rest = warp_sum(row.rest);
  if constexpr (kDense) {
    row.weighted = warp_sum(row.weighted);
    row.sum = warp_sum(row.sum);
    row.count = warp_sum(row.count);
  }
  return row;
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

// Statistics of this warp's vectors: steps 1 and 2 of row_loss_kernel, with `gather` between them. `careful` is set where
// some logit of the warp needs the careful exponent.
template <class Element, Residence kResidence, Features kFeatures, class Gather>
__device__ __forceinline__ RowStatistics<float> measure_kept(const RowSlice<Element>& row,
                                                             const Kept<Element, kResidence>& kept,
                                                             const LogitScale& scale, int n_slots, Gather gather,
                                                             bool& careful) {
  const int thread = threadIdx.x, n_threads = blockDim.x, n_mine = row.all.of(thread);
  float best = -INFINITY, lowest = INFINITY;
  int best_slot = -1;
  for (int stage = 0; stage < kStages<kResidence>; ++stage) {
    if constexpr (Kept<Element, kResidence>::kStaged) {
      if (stage == 0) cp_async_wait<3>();
      if (stage == 1) cp_async_wait<2>();
      if (stage == 2) cp_async_wait<1>();
      if (stage == 3) cp_async_wait<0>();
    }
    const SlotRange range = slots_of_stage<kResidence>(n_slots, stage);
    for_slots<kResidence, kSlotsAtOnce<Element, kFeatures>>(range.begin, min(range.end, n_mine), [&](int i) {
      float high, low;
      vector_range<Element>(kept.get(row, i, 0), high, low);
      if (high > best) best = high, best_slot = i;
      lowest = fminf(lowest, low);
    });
  }
  gather();
  const float warp_best = warp_max(best);
  const bool may_win = best == warp_best && best_slot >= 0;
  const int best_vector = row.first + best_slot * n_threads + thread;
  const int winner = warp_min(may_win ? best_vector : kNoColumn);  // the first that holds the maximum
  const int winner_slot = may_win && best_vector == winner ? best_slot : -1;
  const CappedLogit capped_best = capped_logit<kFeatures>(warp_best, scale);
  const float reference = warp_best == -INFINITY ? 0.f : capped_best.value;
  if constexpr (kFeatures != Features::plain) careful = __any_sync(kWholeWarp, lowest < kLowestOrdinary);
  if constexpr (kFeatures == Features::capped) careful = careful || is_flat(capped_best);

  const auto sum_up = [&](auto is_careful) {
    const Exponent<Element, kFeatures, decltype(is_careful)::value> exponent(scale, reference);
    Sums sums;
    int argmax = kNoColumn;
    const auto add = [&](int i, auto may_hold_maximum) {
      constexpr bool kMayHoldMaximum = decltype(may_hold_maximum)::value;
      const int first_column = row.column(row.first + i * n_threads + thread);
      float logits[kVectorSize<Element>];
      unpack<Element>(kept.get(row, i, 0), logits);
      int excluded = -1;
      if (kMayHoldMaximum && i == winner_slot) {
        excluded = first_equal<Element>(logits, warp_best);
        argmax = first_column + excluded < argmax ? first_column + excluded : argmax;
      }
      accumulate<kMayHoldMaximum>(logits, first_column, excluded, exponent, sums, argmax);
    };
    if constexpr (kResidence == Residence::registers) {
      for_slots<kResidence, 1>(0, n_mine, [&](int i) { add(i, std::true_type()); });
    } else {
      // the winner's vector apart: no other one is compared with the maximum, element by element
      for_slots<kResidence, kSlotsAtOnce<Element, kFeatures>>(0, n_mine, [&](int i) {
        if (i != winner_slot) add(i, std::false_type());
      });
      if (winner_slot >= 0) add(winner_slot, std::true_type());
    }
    sums.rest = warp_sum(sums.rest);
    if constexpr (kFeatures != Features::plain) {
      sums.weighted = warp_sum(sums.weighted);
      sums.sum = warp_sum(sums.sum);
      sums.count = warp_sum(sums.count);
    }
    if constexpr (kFeatures == Features::capped && decltype(is_careful)::value)
      argmax = warp_min(argmax);
    else  // n_threads is a multiple of 32
      argmax = __shfl_sync(kWholeWarp, argmax, winner - row.first);
    return to_statistics(sums, exponent, warp_best == -INFINITY ? warp_best : reference, argmax);
  };
  return with_care<Element, kFeatures>(careful || needs_care(reference, scale), sum_up);
}

// The same for a row that is not kept: every vector is a part of its own.
template <class Element, Features kFeatures>
__device__ __forceinline__ RowStatistics<float> measure_streamed(const RowSlice<Element>& row, const LogitScale& scale,
                                                                 int n_slots) {
  const int thread = threadIdx.x, n_threads = blockDim.x;
  RowStatistics<float> partial = empty_statistics<float>();
#pragma unroll 2
  for (int i = 0; i < n_slots; ++i) {
    const int vector = row.first + i * n_threads + thread;
    if (vector >= row.last) break;
    const uint4 bits = row.load(vector);
    float high, low, logits[kVectorSize<Element>];
    vector_range<Element>(bits, high, low);
    unpack<Element>(bits, logits);
    const bool is_empty = high == -INFINITY;
    const float reference = is_empty ? 0.f : capped_logit<kFeatures>(high, scale).value;
    const Exponent<Element, kFeatures, true> exponent(scale, reference);
    const int excluded = is_empty ? -1 : first_equal<Element>(logits, high);
    int argmax = is_empty ? kNoColumn : row.column(vector) + excluded;
    Sums sums;
    accumulate<true>(logits, row.column(vector), excluded, exponent, sums, argmax);
    partial =
        merge(partial, to_statistics(sums, exponent, is_empty ? high : reference, argmax), scale.inverse_temperature);
  }
  return merge_lanes(partial, scale.inverse_temperature);
}

}  // namespace ava
