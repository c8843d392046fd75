// The tail of soft targets (tail_share in ../softmax_rows.h) in the scalar kernel: a target that stands for all columns
// but those that are named behind it.
#pragma once
#include "softmax_rows_sparse.cuh"

namespace ava {

// The entry of a row that is kTailId and counts; 0: none.
template <class Real>
__device__ __forceinline__ int tail_of(const RowArguments& a, int64_t row, bool given) {
  if (!(a.all_flags & kTail)) return 0;
  const auto* const coefficients = static_cast<const Real*>(a.row_coefficients) + row * (kRowCoefficients + a.n_ids);
  for (int k = 1; k <= a.n_ids; ++k) {
    if (id_of(a, row, k - 1) != kTailId) continue;
    if (a.summaries) return k;
    if (given && coefficients[kRowCoefficients + k - 1] != 0) return k;
    const bool is_soft = a.flags & kSoftTargets && a.n_groups > 0 && k == 1 + a.n_ids - a.group_sizes[a.n_groups - 1];
    if (!given && is_soft && static_cast<const Real*>(a.id_values)[row * a.n_ids + k - 1] != 0) return k;
  }
  return 0;
}

// Whether a column belongs to the tail.
__device__ __forceinline__ bool is_in_tail(const RowArguments& a, int64_t row, int tail, int32_t column) {
  if (tail == 0) return false;
  for (int k = tail + 1; k <= a.n_ids; ++k)
    if (id_of(a, row, k - 1) == column) return false;
  return true;
}

// Of an evaluated row, or of one whose coefficients are given: the tail's loss, what it adds to the coefficient of p_j
// of every column, and returned, to that of its own. `mass`: T.
template <class Real>
__device__ __forceinline__ Real take_tail(const RowArguments& a, const RowOptions<Real>& options, int64_t row_index,
                                          const RowStatistics<Real>& row, int tail, bool given, Real mass,
                                          SparseEntry<Real>* entries, RowScratch<Real>* scratch) {
  if (given)
    return bounded_coefficient(
        static_cast<const Real*>(
            a.row_coefficients)[row_index * (kRowCoefficients + a.n_ids) + kRowCoefficients + tail - 1],
        options.temperature);
  const Real weight = static_cast<const Real*>(a.id_values)[row_index * a.n_ids + tail - 1];
  const Real row_weight = weight_of<Real>(a, row_index);
  const TailShare<Real> share = tail_share(row, mass, weight);
  RowCoefficients<Real>& coefficients = scratch->evaluation.coefficients;
  coefficients.probability += share.probability * row_weight;
  scratch->dense =
      finite_dense_gradient(row, coefficients, scratch->others + scratch->maximum, 1 / options.temperature);
  if (row.count == 0) scratch->dense = {};
  entries[tail].loss = share.loss;
  return entries[tail].own = bounded_coefficient(share.outside * row_weight, options.temperature);
}

}  // namespace ava
