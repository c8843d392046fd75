// What one warp does for a row besides its vectors: the entries of the target and of the candidates, the terms, the
// coefficients, the outputs. Everything here is called by all `lanes` of the row; entries and scratch are in shared
// memory that only these write. Of n lanes, lane i looks after the entries i, i + n, ... in loops that are not unrolled:
// few lanes have a second entry, and every copy of a device assert costs registers.
#pragma once
#include "primitives.cuh"
#include "softmax_rows_arguments.h"

namespace ava {

// The lanes that look after a row: a whole warp, or an equal share of one that has several rows.
struct Lanes {
  int lane, count;  // count: a power of two
  unsigned mask;

  __device__ __forceinline__ void sync() const { __syncwarp(mask); }
  // Every lane gets the same bits. Where no lane has two values, so do more lanes: theirs would be zeros.
  template <class Type>
  __device__ __forceinline__ Type sum(Type value) const {
#pragma unroll
    for (int offset = count / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
    return value;
  }
};
__device__ __forceinline__ Lanes whole_warp() { return {int(threadIdx.x) % 32, 32, kWholeWarp}; }

// The target of a row; 0 where the operator has none; -1 for a row that is left out, whose logits nobody looks at.
__device__ __forceinline__ int32_t counted_target(const RowArguments& a, int64_t row) {
  if (!a.targets) return a.row_mask && !a.row_mask[row] ? -1 : 0;
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) return -1;
  AVA_DEVICE_CHECK((target >= 0 && target < a.vocab_size) &&
                   "row_loss: expected targets in [0, vocab_size) or ignore_index");
  return int32_t(target);
}

template <class Real>
__device__ __forceinline__ Real weight_of(const RowArguments& a, int64_t row) {
  return a.row_weights ? static_cast<const Real*>(a.row_weights)[row] : Real(1);
}

// The column of entry 1 + k, checked. An id of 64 bits is two words, low and high: to look at them one by one takes fewer
// registers than an int64_t, which is converted, chosen and compared in pairs.
__device__ __forceinline__ int32_t id_of(const RowArguments& a, int64_t row, int k) {
  const int32_t* const words = a.ids + ((row * a.n_ids + k) << a.ids_are_wide);
  const int32_t id = words[0], high = words[a.ids_are_wide];  // of 32 bits: the same word twice
  const bool is_int32 = high == id >> (31 * a.ids_are_wide);
  const int32_t lowest = a.flags & kIdsArePresent ? 0 : a.flags & kTail ? kTailId : -1;
  AVA_DEVICE_CHECK((is_int32 && id >= lowest && id < a.vocab_size) &&
                   "row operators: expected ids in [0, vocab_size) or -1");
  return id;
}

// u of one column
template <class Real>
__device__ __forceinline__ Real scalar_u(const RowArguments& a, const RowOptions<Real>& options,
                                         const RowStatistics<Real>& row, int32_t column, Real logit) {
  if (column == int32_t(row.argmax)) return 0;
  if (logit == Real(-INFINITY)) return logit;
  if (a.flags & kSoftcap) logit = options.softcap * tanh_of(logit * (1 / options.softcap));
  // -inf is for masked columns: beside a maximum of +inf this is a finite distance, and R a nan
  const Real u = (logit - row.max) * (1 / options.temperature);
  return u < lowest_finite<Real>() ? lowest_finite<Real>() : u;
}
template <class Real>
__device__ __forceinline__ Real scalar_cap_slope(const RowArguments& a, const RowOptions<Real>& options, Real logit) {
  if (!(a.flags & kSoftcap)) return 1;
  const Real t = tanh_of(logit * (1 / options.softcap));
  return 1 - t * t;
}

// Reads the entries of a row: before anything is written over it.
template <class Real, class LogitOf>
__device__ __forceinline__ void gather_entries(const RowArguments& a, int64_t row, int32_t first_column,
                                               SparseEntry<Real>* entries, const Lanes& lanes, LogitOf logit_of) {
#pragma unroll 1
  for (int k = lanes.lane; k <= a.n_ids; k += lanes.count) {
    SparseEntry<Real> entry{};
    entry.column = k == 0 ? first_column : id_of(a, row, k - 1);
    if (entry.column >= 0) entry.logit = logit_of(entry.column);
    if (k > 0 && a.id_values) entry.own = static_cast<const Real*>(a.id_values)[row * a.n_ids + k - 1];
    entries[k] = entry;
  }
}

template <class Real>
__device__ __forceinline__ void sum_of_entries(const SparseEntry<Real>& entry, const RowStatistics<Real>& row,
                                               Real& others, Real& maximum) {
  if (entry.column < 0) return;
  if (entry.column == int32_t(row.argmax))
    maximum += entry.own;
  else
    others += entry.own;
}

// Of coefficients that are not bounded yet, in two instructions.
template <class Real>
__device__ __forceinline__ DenseGradient<Real> finite_dense_gradient(const RowStatistics<Real>& row,
                                                                     const RowCoefficients<Real>& coefficients,
                                                                     Real log_prob_coefficients,
                                                                     Real inverse_temperature) {
  constexpr float kMost = 2e38f;
  DenseGradient<Real> dense = dense_gradient(row, coefficients, log_prob_coefficients, inverse_temperature);
  if constexpr (std::is_same<Real, float>::value)
    dense.factor = min_keep_nan(max_keep_nan(dense.factor, -kMost), kMost);
  else
    dense.factor = bounded_coefficient(dense.factor, Real(1));
  return dense;
}

template <class Real>
__device__ __forceinline__ void finish_scratch(RowScratch<Real>* scratch, const RowStatistics<Real>& row,
                                               const RowEvaluation<Real>& evaluation, Real others, Real maximum,
                                               Real inverse_temperature, int n_ids, const Lanes& lanes) {
  if (n_ids > 0) {  // else lane 0 alone has an entry
    others = lanes.sum(others);
    maximum = lanes.sum(maximum);
  }
  if (lanes.lane == 0) {
    DenseGradient<Real> dense =
        finite_dense_gradient(row, evaluation.coefficients, others + maximum, inverse_temperature);
    if (row.count == 0) dense = {};
    *scratch = {row, evaluation, dense, others, maximum};
  }
  lanes.sync();
}

// Terms and coefficients of a counted row of row_loss; entry 0 is its target. What the loop needs of the options is read
// again, and held by no register meanwhile.
template <class Real>
__device__ __forceinline__ void evaluate_row(const RowArguments& a, const RowOptions<Real>& options, Real row_weight,
                                             const RowStatistics<Real>& row, SparseEntry<Real>* entries,
                                             RowScratch<Real>* scratch, const Lanes& lanes) {
  const int32_t target = entries[0].column, argmax = int32_t(row.argmax);
  const Real target_u = scalar_u(a, options, row, target, entries[0].logit);
  const Real target_weight = a.flags & kTargetWeights ? entries[1].own : Real(1);
  RowEvaluation<Real> evaluation = evaluate(row, options, a.flags, target == argmax, target_u, target_weight);
  evaluation.target_coefficient *= row_weight;
  evaluation.coefficients.probability *= row_weight;
  evaluation.coefficients.entropy *= row_weight;
  evaluation.coefficients.constant *= row_weight;
  lanes.sync();  // the first entries have been read
  Real others = 0, maximum = 0;
#pragma unroll 1
  for (int k = lanes.lane; k <= a.n_ids; k += lanes.count) {
    SparseEntry<Real> entry = entries[k];
    const Real weight = entry.own;
    entry.u = k == 0 ? target_u : Real(0);
    entry.own = k == 0 ? evaluation.target_coefficient : Real(0);
    if (k > 0) {
      // asked anew for each entry: a register that is kept through the loop would spill
      const bool is_soft = a.flags & kSoftTargets && k > a.n_ids - a.group_sizes[a.n_groups - 1];
      bool counts = entry.column >= 0 && (is_soft || entry.column != target) && weight != 0;
      if (counts) entry.u = scalar_u(a, options, row, entry.column, entry.logit);
      // masked: nothing to push down
      counts = counts && (is_soft || entry.u > Real(-INFINITY) || entry.u != entry.u);
      if (counts) {
        const Real probability = exp_of(entry.u) / (1 + row.rest);
        const CandidateShare<Real> share = is_soft ? soft_target(log_total(row), entry.u, weight)
                                                   : unlikelihood(row, entry.column == argmax, probability, weight);
        entry.loss = share.loss;
        entry.own = share.log_prob_coefficient * row_weight;
      } else {
        entry.column = -1;
      }
    }
    sum_of_entries(entry, row, others, maximum);
    entries[k] = entry;
  }
  finish_scratch(scratch, row, evaluation, others, maximum, 1 / options.temperature, a.n_ids, lanes);
}

// The same where statistics and coefficients are given; entry 0 is i*.
template <class Real>
__device__ __forceinline__ void take_coefficients(const RowArguments& a, const RowOptions<Real>& options,
                                                  int64_t row_index, const RowStatistics<Real>& row,
                                                  SparseEntry<Real>* entries, RowScratch<Real>* scratch,
                                                  const Lanes& lanes) {
  const Real* own_coefficients =
      static_cast<const Real*>(a.row_coefficients) + row_index * (kRowCoefficients + a.n_ids);
  RowEvaluation<Real> evaluation{};
  evaluation.coefficients = {own_coefficients[0], own_coefficients[1], own_coefficients[2], own_coefficients[3]};
  Real others = 0, maximum = 0;
#pragma unroll 1
  for (int k = lanes.lane; k <= a.n_ids; k += lanes.count) {
    SparseEntry<Real> entry = entries[k];
    entry.own = own_coefficients[kRowCoefficients - 1 + k];  // of i*, then of the ids
    if (row.count == 0 || entry.own == 0) entry.column = -1;
    if (entry.column >= 0) entry.u = scalar_u(a, options, row, entry.column, entry.logit);
    sum_of_entries(entry, row, others, maximum);
    entries[k] = entry;
  }
  finish_scratch(scratch, row, evaluation, others, maximum, 1 / options.temperature, a.n_ids, lanes);
}

// The gradient of the entries' columns, in full precision, over what the dense pass left there. Duplicates add up; the
// first one writes. `is_mine` says which columns this block has.
template <class Real, class IsMine, class Store>
__device__ __forceinline__ void write_entries(const RowArguments& a, const RowOptions<Real>& options,
                                              const SparseEntry<Real>* entries, const RowScratch<Real>* scratch,
                                              const Lanes& lanes, IsMine is_mine, Store store) {
  const RowStatistics<Real> row = scratch->statistics;
  if (row.count == 0) return;
#pragma unroll 1
  for (int k = lanes.lane; k <= a.n_ids; k += lanes.count) {
    const int32_t column = entries[k].column;
    bool writes = column >= 0 && is_mine(column);
    for (int earlier = 0; writes && earlier < k; ++earlier) writes = entries[earlier].column != column;
    if (!writes) continue;
    Real own = 0;
    for (int same = k; same <= a.n_ids; ++same)
      if (entries[same].column == column) own += entries[same].own;
    own = bounded_coefficient(own, options.temperature);
    const bool is_argmax = column == int32_t(row.argmax);
    const Real maximum = bounded_coefficient(scratch->maximum, options.temperature);
    const Real u = entries[k].u, others = is_argmax ? scratch->others : scratch->others - own + maximum;
    const Real probability = exp_of(u) / (1 + row.rest);
    const Real gradient =
        sparse_gradient(row, scratch->evaluation.coefficients, is_argmax, u, probability, own, others);
    store(column, u == Real(-INFINITY)
                      ? Real(0)
                      : gradient * (1 / options.temperature) * scalar_cap_slope(a, options, entries[k].logit));
  }
}

// row_loss, row_terms, and where asked for statistics and row_coefficients, of a counted row.
template <class Real>
__device__ __forceinline__ void write_loss(const RowArguments& a, int64_t row, Real row_weight,
                                           const SparseEntry<Real>* entries, const RowScratch<Real>* scratch,
                                           const Lanes& lanes) {
  const RowEvaluation<Real>& evaluation = scratch->evaluation;
  auto* terms = static_cast<Real*>(a.row_terms);
  Real total = evaluation.terms[kMainLoss] + evaluation.terms[kZLossTerm] + evaluation.terms[kConfidencePenaltyTerm];
  for (int group = 0, first = 1; group < a.n_groups; ++group) {
    const int last = first + a.group_sizes[group];
    Real penalty = 0;
    for (int k = first + lanes.lane; k < last; k += lanes.count) penalty += entries[k].loss;
    penalty = lanes.sum(penalty);
    if (lanes.lane == 0) terms[(kRowTerms + group) * a.n_rows + row] = penalty;
    total += penalty;
    first = last;
  }
  for (int term = lanes.lane; term < kRowTerms; term += lanes.count)
    terms[term * a.n_rows + row] = evaluation.terms[term];
  if (lanes.lane == 0) static_cast<Real*>(a.row_loss)[row] = total * row_weight;
  if (!a.row_coefficients) return;
  Real* own_coefficients = static_cast<Real*>(a.row_coefficients) + row * (kRowCoefficients + 1 + a.n_ids);
  if (lanes.lane == 0) {
    static_cast<RowStatistics<Real>*>(a.statistics)[row] = scratch->statistics;
    own_coefficients[0] = evaluation.coefficients.probability;
    own_coefficients[1] = evaluation.coefficients.entropy;
    own_coefficients[2] = evaluation.coefficients.constant;
    own_coefficients[3] = evaluation.coefficients.maximum;
  }
#pragma unroll 1
  for (int k = lanes.lane; k <= a.n_ids; k += lanes.count)
    own_coefficients[kRowCoefficients + k] = bounded_coefficient(entries[k].own, Real(1));
}

// What the open operator reports of a measured row; entry 0 is absent.
template <class Real>
__device__ __forceinline__ void write_summaries(const RowArguments& a, const RowOptions<Real>& options,
                                                int64_t row_index, const RowStatistics<Real>& row,
                                                const SparseEntry<Real>* entries, const Lanes& lanes) {
  const Real total = log_total(row);
  if (lanes.lane == 0) {
    static_cast<RowStatistics<Real>*>(a.statistics)[row_index] = row;
    auto* summaries = static_cast<Real*>(a.summaries);
    summaries[kEntropySummary * a.n_rows + row_index] = total - row.weighted / (1 + row.rest);
    summaries[kLseSummary * a.n_rows + row_index] = row.max * (1 / options.temperature) + total;
    summaries[kLogRestSummary * a.n_rows + row_index] = log_of(row.rest);
    summaries[kMeanLogProbSummary * a.n_rows + row_index] = row.sum / row.count - total;
  }
  for (int k = 1 + lanes.lane; k <= a.n_ids; k += lanes.count) {
    const SparseEntry<Real> entry = entries[k];
    static_cast<Real*>(a.id_log_probs)[row_index * a.n_ids + k - 1] =
        entry.column < 0 ? Real(0) : scalar_u(a, options, row, entry.column, entry.logit) - total;
  }
}

// The outputs of a row that is left out.
template <class Real>
__device__ __forceinline__ void write_nothing(const RowArguments& a, int64_t row, const Lanes& lanes) {
  if (lanes.lane == 0 && a.row_loss) static_cast<Real*>(a.row_loss)[row] = 0;
  if (a.row_terms)
    for (int term = lanes.lane; term < kRowTerms + a.n_groups; term += lanes.count)
      static_cast<Real*>(a.row_terms)[term * a.n_rows + row] = 0;
  if (lanes.lane == 0 && a.statistics) static_cast<RowStatistics<Real>*>(a.statistics)[row] = empty_statistics<Real>();
  const int n_coefficients = kRowCoefficients + 1 + a.n_ids;
  if (a.row_coefficients)
    for (int k = lanes.lane; k < n_coefficients; k += lanes.count)
      static_cast<Real*>(a.row_coefficients)[row * n_coefficients + k] = 0;
  if (a.summaries)
    for (int k = lanes.lane; k < kRowSummaries; k += lanes.count)
      static_cast<Real*>(a.summaries)[k * a.n_rows + row] = 0;
  if (a.id_log_probs)
    for (int k = lanes.lane; k < a.n_ids; k += lanes.count) static_cast<Real*>(a.id_log_probs)[row * a.n_ids + k] = 0;
}

}  // namespace ava
