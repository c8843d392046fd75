// Sums over vectors of logits, the statistics that they make, and the gradient of a vector.
#pragma once
#include "softmax_rows_exponent.cuh"
#include "softmax_rows_slice.cuh"

namespace ava {

constexpr int kNoColumn = INT32_MAX;

// Vectors of one thread that are summed side by side. Of float32, two come to no more than one of 16 bits.
template <class Element, Features kFeatures>
constexpr int kSlotsAtOnce = sizeof(Element) == 4 ? 1 : 2;

// Sums of e, t e, and the exponent's summands; without the maximum, whose u is 0.
struct Sums {
  float rest = 0, weighted = 0, sum = 0;
  int n_masked = 0;
};

template <int kSize>
__device__ __forceinline__ float sum_of(float* values) {  // [kSize], which it uses up
#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2)
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] += values[k + width];
  return values[0];
}

// One vector, in which a stand-in has the place of the maximum. Where a soft cap is flat several logits may have its value
// `at_maximum`: `argmax` becomes the lowest column of those (R is the same whichever of them is left out). kSums: the
// summands of U too; else the tensor cores add them up.
template <bool kSums, class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ void accumulate(const float* logits,  // [kVectorSize]
                                           int first_column, const Exponent<Element, kFeatures, kCareful>& exponent,
                                           float at_maximum, Sums& sums, int& argmax) {
  constexpr int kSize = kVectorSize<Element>;
  float rest[kSize], summands[kSize], weighted = 0;
  CappedLogit capped[kSize];
  exponent.cap(logits, capped);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const float x = capped[k].value;
    if constexpr (kFeatures == Features::capped && kCareful)
      if (x == at_maximum && first_column + k < argmax) argmax = first_column + k;
    float steps;
    const float e = exponent.exponential(x, steps);
    rest[k] = e;
    if constexpr (kFeatures != Features::plain) {
      weighted = fmaf(steps, e, weighted);
      const bool is_masked = kCareful && x == -INFINITY;
      summands[k] = is_masked ? 0.f : exponent.summand(x);
      sums.n_masked += is_masked;
    }
  }
  sums.rest += sum_of<kSize>(rest);
  if constexpr (kFeatures != Features::plain) {
    sums.weighted += weighted;
    if constexpr (kSums) sums.sum += sum_of<kSize>(summands);
  }
}

// Takes what stood in for the maximum out of the sums.
template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ void take_out(float stand_in, const Exponent<Element, kFeatures, kCareful>& exponent,
                                         Sums& sums) {
  if constexpr (kCareful) {
    --sums.n_masked;
  } else {
    const float logits[] = {stand_in, stand_in};
    CappedLogit capped[2];
    exponent.cap_two(logits, capped);
    sums.sum -= exponent.summand(capped[0].value);
    if constexpr (exponent.kStandInCounts) {
      float steps;
      const float e = exponent.exponential(capped[0].value, steps);
      sums.rest -= e;
      sums.weighted = fmaf(-steps, e, sums.weighted);
    }
  }
}

// Takes the rounding of the reference back out of the sums. count: V
template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ RowStatistics<float> to_statistics(const Sums& sums,
                                                              const Exponent<Element, kFeatures, kCareful>& exponent,
                                                              float max, int argmax, float count) {
  const float undo = exponent.undo(), column = argmax == kNoColumn ? -1.f : float(argmax);
  if constexpr (kFeatures == Features::plain) return {max, column, sums.rest * undo, 0.f, 0.f, 0.f};
  return {max,
          column,
          sums.rest * undo,
          fmaf(-exponent.excess, sums.rest, sums.weighted) * undo * kLn2,
          exponent.sum_of_u(sums.sum, count - 1),
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
  const float undo = exponent.undo(), slope = dense.slope * exponent.scale.inverse_factor;
  constexpr float kOfSlope = kFeatures == Features::capped ? 4.f : 1.f;  // whose quarter is there
  return {(dense.factor - slope * exponent.excess) * undo * kOfSlope, slope * undo * kOfSlope,
          dense.constant * kOfSlope};
}

template <class Element, Features kFeatures, bool kCareful>
__device__ __forceinline__ uint4 gradient_vector(uint4 logits, const GradientScalars& row,
                                                 const Exponent<Element, kFeatures, kCareful>& exponent) {
  constexpr int kSize = kVectorSize<Element>;
  float values[kSize];
  CappedLogit capped[kSize];
  unpack<Element>(logits, values);
  exponent.cap(values, capped);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const CappedLogit x = capped[k];
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
    row.count = Real(warp_sum(int(row.count)));  // below 2^24, and never a nan
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

// The largest element of some vectors; a nan loses. Of 16 bits one pair after the other: a GPU compares three in one
// instruction.
template <class Element, int kVectors>
__device__ __forceinline__ float largest(const uint4 (&vectors)[kVectors]) {
  constexpr int kPairs = 4 * kVectors;
  float values[kVectorSize<Element>];
  if constexpr (sizeof(Element) == 2) {
    ElementPair<Element> pairs[kPairs];
    memcpy(static_cast<void*>(pairs), vectors, sizeof(pairs));
#pragma unroll
    for (int k = 1; k < kPairs; ++k) pairs[0] = __hmax2(pairs[0], pairs[k]);
    uint4 last{};
    memcpy(static_cast<void*>(&last.x), pairs, 4);
    unpack<Element>(last, values);
    return fmaxf(values[0], values[1]);
  } else {
    float high = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      unpack<Element>(vectors[k], values);
      const float highest = fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3]));
      high = k == 0 ? highest : fmaxf(high, highest);
    }
    return high;
  }
}

// The lowest element of all vectors that a thread has looked at.
template <class Element>
struct Lowest {
  // bits of a float, or of a pair, which two variables of 16 bits would be packed to every time. First infinity
  unsigned lowest = sizeof(Element) == 4 ? 0x7f800000 : std::is_same<Element, __half>::value ? 0x7c007c00 : 0x7f807f80;

  __device__ __forceinline__ void look_at(uint4 bits) {
    if constexpr (sizeof(Element) == 2) {
      ElementPair<Element> pairs[5];
      memcpy(static_cast<void*>(pairs), &bits, 16);
      memcpy(static_cast<void*>(pairs + 4), &lowest, 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) pairs[4] = __hmin2(pairs[4], pairs[k]);
      memcpy(static_cast<void*>(&lowest), pairs + 4, 4);
    } else {
      float high, low;
      vector_range<Element>(bits, high, low);
      lowest = __float_as_uint(fminf(__uint_as_float(lowest), low));
    }
  }
  __device__ __forceinline__ float value() const {
    float values[kVectorSize<Element>];
    unpack<Element>({lowest, 0, 0, 0}, values);
    return sizeof(Element) == 2 ? fminf(values[0], values[1]) : values[0];
  }
};

// Statistics of this warp's vectors: steps 1 and 2 of row_loss_kernel, with `gather` between them. `careful` is set where
// some logit of the warp needs the careful exponent.
template <class Element, Residence kResidence, Features kFeatures, class Gather>
__device__ __forceinline__ RowStatistics<float> measure_kept(const RowSlice<Element>& row,
                                                             const Kept<Element, kResidence>& kept,
                                                             const LogitScale& scale, Gather gather, bool& careful) {
  const int thread = threadIdx.x, n_threads = blockDim.x, n_mine = row.all.of(thread);
  float best = -INFINITY;
  int best_slot = -1;
  Lowest<Element> lowest;
  constexpr int kGroup = kSlotsAtOnce<Element, kFeatures>;  // looked at together
  for (int stage = 0, begin = 0; stage < kStages<kResidence>; ++stage) {
    if constexpr (kStages<kResidence> == 2) {
      if (stage == 0) cp_async_wait<1>();
      if (stage == 1) cp_async_wait<0>();
    }
    const int end =
        stage + 1 < kStages<kResidence> ? min(slots_of_stage<kResidence>(row.arguments, 0).end, n_mine) : n_mine;
    const auto look_at = [&](int i, auto... more) {  // slots, of which it is the first that is remembered
      const uint4 vectors[] = {kept.get(row, i, 0), kept.get(row, more, 0)...};
      const float high = largest<Element>(vectors);
      if (high > best) best = high, best_slot = i;
      if constexpr (kFeatures != Features::plain)
        for (const uint4 bits : vectors) lowest.look_at(bits);
    };
#pragma unroll 1
    for (int i = begin; i < end; i += kGroup) {
      if constexpr (kGroup == 1)
        look_at(i);
      else
        look_at(i, min(i + 1, end - 1));
    }
    begin = end;
  }
  gather();
  const float warp_best = warp_max(best);
  const bool may_win = best == warp_best && best_slot >= 0;
  if (kGroup > 1 && may_win && largest<Element>({kept.get(row, best_slot, 0)}) != warp_best) ++best_slot;
  const int best_vector = row.first + best_slot * n_threads + thread;
  const int winner = warp_min(may_win ? best_vector : kNoColumn);  // the first that holds the maximum
  const bool wins = may_win && best_vector == winner;              // nobody where all is masked
  // every lane looks at one of the winner's elements
  int argmax = kNoColumn;
  Element* best_place = nullptr;
  if (winner != kNoColumn) {
    auto* const elements = reinterpret_cast<Element*>(kept.slots - thread + (winner - row.first));
    __syncwarp();  // the copy is the winner's
    const int k = thread % kVectorSize<Element>;
    const int found = __ffs(int(__ballot_sync(kWholeWarp, to_float(elements[k]) == warp_best))) - 1;
    best_place = elements + found;
    argmax = row.column(winner) + found;
    __syncwarp();  // only the winner writes to it
  }
  const CappedLogit capped_best = capped_logit<kFeatures>(warp_best, scale);
  const float reference = warp_best == -INFINITY ? 0.f : capped_maximum<kFeatures>(warp_best, scale);
  if constexpr (kFeatures != Features::plain) careful = __any_sync(kWholeWarp, lowest.value() < kLowestOrdinary);
  if constexpr (kFeatures == Features::capped) careful = careful || is_flat(capped_best);

  const auto sum_up = [&](auto is_careful) {
    using RowExponent = Exponent<Element, kFeatures, decltype(is_careful)::value>;
    constexpr bool kByTensorCores = kFeatures == Features::dense && !RowExponent::kExact;
    const RowExponent exponent(scale, reference);
    const Element stand_in = exponent.stand_in(warp_best);
    if (wins) store_in_vector(best_place, stand_in);

    Sums sums;
    TileSums logit_sums;
    const auto add = [&](int i, auto is_ragged) {
      constexpr bool kSums = decltype(is_ragged)::value || !kByTensorCores;
      const uint4 bits = kept.get(row, i, 0);
      float logits[kVectorSize<Element>];
      unpack<Element>(bits, logits);
      if constexpr (!kSums) add_tile<Element>(bits, logit_sums);
      accumulate<kSums>(logits, row.column(row.first + i * n_threads + thread), exponent, capped_best.value, sums,
                        argmax);
    };
    // the tensor cores take the slots that all lanes of the warp have
    const int n_common = kByTensorCores ? warp_min(n_mine) : n_mine;
    for_slots<kSlotsAtOnce<Element, kFeatures>>(0, n_common, [&](int i) { add(i, std::false_type()); });
    if (kByTensorCores && n_common < n_mine) add(n_common, std::true_type());
    if constexpr (kByTensorCores) sums.sum += lane_sum(logit_sums);

    if (wins) {
      store_in_vector(best_place, from_float<Element>(warp_best));
      if constexpr (kFeatures != Features::plain) take_out(to_float(stand_in), exponent, sums);
    }
    int count = 0;
    if constexpr (kFeatures == Features::plain) {
      sums.rest = warp_sum(sums.rest);
    } else {
      warp_sums(sums.rest, sums.weighted, sums.sum);
      count = warp_sum(n_mine * kVectorSize<Element> - sums.n_masked);
    }
    if constexpr (kFeatures == Features::capped && decltype(is_careful)::value) argmax = warp_min(argmax);
    return to_statistics(sums, exponent, warp_best == -INFINITY ? warp_best : reference, argmax, float(count));
  };
  return with_care<Element, kFeatures>(careful || needs_care<kFeatures>(reference, scale), sum_up);
}

// The same for a row that is not kept: every vector is a part of its own.
template <class Element, Features kFeatures>
__device__ __forceinline__ RowStatistics<float> measure_streamed(const RowSlice<Element>& row,
                                                                 const LogitScale& scale) {
  const int thread = threadIdx.x, n_threads = blockDim.x;
  RowStatistics<float> partial = empty_statistics<float>();
#pragma unroll 2
  for (int i = 0; i < row.arguments.n_slots; ++i) {
    const int vector = row.first + i * n_threads + thread;
    if (vector >= row.last) break;
    const uint4 bits = row.load(vector);
    float high, low, logits[kVectorSize<Element>];
    vector_range<Element>(bits, high, low);
    unpack<Element>(bits, logits);
    const bool is_empty = high == -INFINITY;
    const float reference = is_empty ? 0.f : capped_maximum<kFeatures>(high, scale);
    const Exponent<Element, kFeatures, true> exponent(scale, reference);
    const int place = is_empty ? -1 : first_equal<Element>(logits, high);
#pragma unroll
    for (int k = 0; k < kVectorSize<Element>; ++k) logits[k] = k == place ? -INFINITY : logits[k];
    int argmax = is_empty ? kNoColumn : row.column(vector) + place;
    Sums sums;
    accumulate<true>(logits, row.column(vector), exponent, capped_logit<kFeatures>(high, scale).value, sums, argmax);
    const float count = float(kVectorSize<Element> - sums.n_masked + !is_empty);
    partial = merge(partial, to_statistics(sums, exponent, is_empty ? high : reference, argmax, count),
                    scale.inverse_temperature);
  }
  return merge_lanes(partial, scale.inverse_temperature);
}

}  // namespace ava
