// One block for a row, one column after another, the scalar text of softmax_rows.h. Right rather than fast. For rows of
// float64, which gradcheck runs through, and for rows of every type that come with weights of their columns, want ranks
// or have a tail: those are read up to three times, mostly from the caches.
#pragma once
#include "softmax_rows_measure.cuh"
#include "softmax_rows_sparse.cuh"
#include "softmax_rows_tail.cuh"

namespace ava {

constexpr int kScalarThreads = 256, kScalarWarps = kScalarThreads / 32;

template <class Real>
__device__ __forceinline__ Real scalar_logit(const RowArguments& a, const RowOptions<Real>& options, Real x) {
  return (a.flags & kSoftcap) && x != Real(-INFINITY) ? options.softcap * tanh_of(x * (1 / options.softcap)) : x;
}

// The weight of one column of a row.
template <class Element>
__device__ __forceinline__ RealOf<Element> column_weight(const RowArguments& a, int64_t row, int column) {
  const int64_t at = row_offset(a.column_weights_layout, uint32_t(row)) + column;
  if (a.column_weights_are_real) return static_cast<const RealOf<Element>*>(a.column_weights)[at];
  return to_real(static_cast<const Element*>(a.column_weights)[at]);
}

// What a second look at a row gives, once its maximum is known.
template <class Real>
struct SecondLook {
  ColumnWeightSums<Real> weights;
  Real n_greater;  // columns whose logit is greater than the target's
  Real tail_mass;  // sum of e^u over the columns of the tail
};
template <class Real>
__device__ __forceinline__ SecondLook<Real> sum_of_lanes(SecondLook<Real> mine) {
  return {{warp_sum(mine.weights.rest), warp_sum(mine.weights.at_maximum), warp_sum(mine.weights.weighted)},
          warp_sum(mine.n_greater),
          warp_sum(mine.tail_mass)};
}
template <class Element, class Real>
__device__ __forceinline__ SecondLook<Real> second_look(const RowArguments& a, const RowOptions<Real>& options,
                                                        int64_t row_index, const Element* x,
                                                        const RowStatistics<Real>& row, int32_t target, int tail) {
  SecondLook<Real> mine{};
  const bool are_probabilities = a.all_flags & kTargetProbabilities;
  const Real of_target = a.all_flags & kRanks ? to_real(x[target]) : Real(0);
  for (int column = threadIdx.x; column < a.vocab_size; column += kScalarThreads) {
    const Real logit = to_real(x[column]);
    if (a.all_flags & kRanks && (logit > of_target || of_target != of_target)) mine.n_greater += 1;
    const bool is_masked = logit == Real(-INFINITY);
    if (!is_masked && is_in_tail(a, row_index, tail, column))
      mine.tail_mass += exp_of((scalar_logit(a, options, logit) - row.max) * (1 / options.temperature));
    if (!a.column_weights) continue;
    const Real q = is_masked && !are_probabilities ? Real(0) : column_weight<Element>(a, row_index, column);
    (column == int32_t(row.argmax) ? mine.weights.at_maximum : mine.weights.rest) += q;
    if (q != 0)
      mine.weights.weighted +=
          q * (is_masked ? logit : (scalar_logit(a, options, logit) - row.max) * (1 / options.temperature));
  }
  return mine;
}

// What the weights of the columns change in a row that is evaluated, or whose coefficients are given.
template <class Element, class Real>
__device__ __forceinline__ void take_column_weights(const RowArguments& a, const RowOptions<Real>& options,
                                                    int64_t row_index, const RowStatistics<Real>& row,
                                                    const ColumnWeightSums<Real>& sums, bool given,
                                                    RowScratch<Real>* scratch, int lane) {
  if (lane == 0) {
    RowEvaluation<Real>& evaluation = scratch->evaluation;
    if (!given) {
      RowEvaluation<Real> own{};
      if (a.all_flags & kTargetProbabilities)  // smoothing; the launcher has taken the target's term away
        own = evaluate(row, options, a.all_flags & (kCrossEntropy | kLabelSmoothing), false, Real(0), Real(0));
      add_column_weights(row, options, a.all_flags, sums, own);
      const Real row_weight = weight_of<Real>(a, row_index);
      evaluation.terms[kMainLoss] += own.terms[kMainLoss];
      if (a.all_flags & kTargetProbabilities) evaluation.terms[kCrossEntropyMetric] = own.terms[kCrossEntropyMetric];
      evaluation.coefficients.probability += own.coefficients.probability * row_weight;
      evaluation.coefficients.constant += own.coefficients.constant * row_weight;
      evaluation.coefficients.maximum = own.coefficients.maximum * row_weight;
    }
    if (row.count != 0 && row.argmax >= 0 && row.argmax < Real(a.vocab_size))
      scratch->maximum += evaluation.coefficients.maximum * column_weight<Element>(a, row_index, int32_t(row.argmax));
    scratch->dense = finite_dense_gradient(row, evaluation.coefficients, scratch->others + scratch->maximum,
                                           1 / options.temperature);
    if (row.count == 0) scratch->dense = {};
  }
  __syncwarp();
}
// What the weight of a column and the tail add to its gradient. outside: coefficient of p_j of the columns of the tail.
template <class Element, class Real>
__device__ __forceinline__ Real further_gradient(const RowArguments& a, const RowOptions<Real>& options,
                                                 int64_t row_index, const RowScratch<Real>* scratch, int tail,
                                                 Real outside, int32_t column, Real logit) {
  const RowStatistics<Real>& row = scratch->statistics;
  if (row.count == 0 || logit == Real(-INFINITY)) return 0;
  const bool is_argmax = column == int32_t(row.argmax);
  Real gradient = 0;
  if (a.column_weights)
    gradient += scratch->evaluation.coefficients.maximum * column_weight<Element>(a, row_index, column) *
                (is_argmax ? row.rest / (1 + row.rest) : Real(1));
  if (is_in_tail(a, row_index, tail, column))
    gradient += outside * exp_of(scalar_u(a, options, row, column, logit)) / (1 + row.rest);
  return gradient * (1 / options.temperature) * scalar_cap_slope(a, options, logit);
}

// `given`: statistics and coefficients come from outside (row_gradient), else from here (row_loss, row_statistics)
template <class Element>
__global__ void __launch_bounds__(kScalarThreads) scalar_rows_kernel(const RowArguments a, bool given) {
  using Real = RealOf<Element>;
  AVA_DYNAMIC_SHARED(shared);
  AVA_SHARED(RowStatistics<Real>, partials, kScalarWarps);
  AVA_SHARED(SecondLook<Real>, looks, kScalarWarps);
  AVA_SHARED(Real, of_tail, 1);  // coefficient of p_j of its columns
  auto* const scratch = reinterpret_cast<RowScratch<Real>*>(shared);
  auto* const entries = reinterpret_cast<SparseEntry<Real>*>(scratch + 1);  // [1 + n_ids]
  const int64_t row_index = blockIdx.x;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Lanes lanes = whole_warp();
  const RowOptions<Real> options = *static_cast<const RowOptions<Real>*>(a.options);
  const Real inverse_temperature = 1 / options.temperature;
  const auto* const x = static_cast<const Element*>(a.logits) + row_offset(a.logits_layout, uint32_t(row_index));
  Element* const out =
      a.grad_logits ? static_cast<Element*>(a.grad_logits) + row_offset(a.grad_layout, uint32_t(row_index)) : nullptr;
  const auto* const statistics = static_cast<const RowStatistics<Real>*>(a.statistics);
  Real* const ranks = static_cast<Real*>(a.row_terms) + (kRowTerms + a.n_groups) * a.n_rows + row_index;  // with kRanks
  const int32_t target = given ? 0 : counted_target(a, row_index);
  if (given ? statistics[row_index].count == 0 : target < 0) {
    for (int column = thread; out && column < a.n_columns; column += kScalarThreads)
      out[column] = from_real<Element>(0);
    if (warp == 0 && !given) write_nothing<Real>(a, row_index, lanes);
    if (thread == 0 && !given && a.all_flags & kRanks)
      ranks[kRankMetric * a.n_rows] = ranks[kArgmaxMetric * a.n_rows] = 0;
    return;
  }

  if (!given) {
    RowStatistics<Real> partial = empty_statistics<Real>();
    for (int column = thread; column < a.vocab_size; column += kScalarThreads)
      partial = update(partial, scalar_logit(a, options, to_real(x[column])), column, inverse_temperature);
    partial = merge_lanes(partial, inverse_temperature);
    if (lane == 0) partials[warp] = partial;
  }
  __syncthreads();
  RowStatistics<Real> row;  // every warp has it
  if (given) {
    row = statistics[row_index];
  } else {
    row = lane < kScalarWarps ? partials[lane] : empty_statistics<Real>();
    row = finished(merge_lanes(row, inverse_temperature), true);
  }
  const int tail = tail_of<Real>(a, row_index, given);
  const bool looks_again = !given && (a.column_weights || a.all_flags & kRanks || tail > 0);
  if (looks_again) {
    const SecondLook<Real> look = sum_of_lanes(second_look(a, options, row_index, x, row, target, tail));
    if (lane == 0) looks[warp] = look;
    __syncthreads();
  }
  if (warp == 0) {
    const int32_t argmax = row.argmax < Real(a.vocab_size) && !a.column_weights ? int32_t(row.argmax) : -1;
    const int32_t first_column = given ? argmax : a.targets ? target : -1;
    gather_entries(a, row_index, first_column, entries, lanes, [&](int column) { return to_real(x[column]); });
    __syncwarp();
    if (given)
      take_coefficients(a, options, row_index, row, entries, scratch, lanes);
    else if (a.summaries)
      write_summaries(a, options, row_index, row, entries, lanes);
    else
      evaluate_row(a, options, weight_of<Real>(a, row_index), row, entries, scratch, lanes);
    __syncwarp();
    SecondLook<Real> look{};
    if (looks_again) look = sum_of_lanes(lane < kScalarWarps ? looks[lane] : look);
    if (tail > 0 && a.summaries) {
      if (lane == 0)
        static_cast<Real*>(a.id_log_probs)[row_index * a.n_ids + tail - 1] =
            row.count == 0 ? Real(-INFINITY) : log_of(look.tail_mass) - log_total(row);
    } else if (tail > 0) {
      if (lane == 0) of_tail[0] = take_tail(a, options, row_index, row, tail, given, look.tail_mass, entries, scratch);
      __syncwarp();
    }
    if (a.column_weights) {
      if (row.count == 0) look.weights = {0, 0, a.all_flags & kTargetProbabilities ? Real(-INFINITY) : Real(0)};
      take_column_weights<Element>(a, options, row_index, row, look.weights, given, scratch, lane);
    }
    if (lane == 0 && a.all_flags & kRanks && a.row_loss) {
      ranks[kRankMetric * a.n_rows] = 1 + look.n_greater;
      ranks[kArgmaxMetric * a.n_rows] = 1 + row.argmax;
    }
    if (a.row_loss) write_loss(a, row_index, weight_of<Real>(a, row_index), entries, scratch, lanes);
    __syncwarp();
    if (out && (a.column_weights || tail > 0))  // their penalties are written: a further gradient takes the place
      for (int k = lane; k <= a.n_ids; k += 32)
        entries[k].loss = entries[k].column < 0
                              ? Real(0)
                              : further_gradient<Element>(a, options, row_index, scratch, tail, of_tail[0],
                                                          entries[k].column, entries[k].logit);
  }
  if (!out) return;
  __syncthreads();
  const DenseGradient<Real> dense = scratch->dense;
  for (int column = thread; column < a.n_columns; column += kScalarThreads) {
    Real gradient = 0;
    const Real logit = column < a.vocab_size ? to_real(x[column]) : Real(-INFINITY);
    if (row.count != 0 && logit != Real(-INFINITY)) {
      const Real difference = scalar_logit(a, options, logit) - row.max;
      const Real lowest = lowest_u<Real>() * options.temperature, bounded = difference < lowest ? lowest : difference;
      gradient = exp_of(difference * inverse_temperature) * (dense.factor + dense.slope * bounded) + dense.constant;
      if (a.column_weights && column == int32_t(row.argmax))  // without its own -s p, which would cancel
        gradient = sparse_gradient(row, scratch->evaluation.coefficients, true, Real(0), 1 / (1 + row.rest), Real(0),
                                   scratch->others) *
                   inverse_temperature;
      gradient *= scalar_cap_slope(a, options, logit);
      if (a.column_weights || tail > 0)
        gradient += further_gradient<Element>(a, options, row_index, scratch, tail, of_tail[0], column, logit);
    }
    out[column] = from_real<Element>(gradient);
  }
  __syncthreads();
  if (warp == 0)
    write_entries(
        a, options, entries, scratch, lanes, [](int) { return true; },
        [&](int column, Real value) {
          for (int k = 0; (a.column_weights || tail > 0) && k <= a.n_ids; ++k)
            if (entries[k].column == column) {
              value += entries[k].loss;
              break;
            }
          out[column] = from_real<Element>(value);
        });
}

// shared memory of a row, and who works on it
template <class Element>
void launch_scalar_rows(const char* op, RowArguments arguments, bool given, Stream stream) {
  using Real = RealOf<Element>;
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_rows));
  shape.block = dim3(kScalarThreads);
  shape.shared_bytes = sizeof(RowScratch<Real>) + size_t(arguments.n_ids + 1) * sizeof(SparseEntry<Real>);
  arguments.all_flags = arguments.flags;
  if (arguments.flags & kTargetProbabilities) arguments.flags &= ~int32_t(kCrossEntropy);  // see take_column_weights
  launch(op, scalar_rows_kernel<Element>, shape, stream, arguments, given);
}

}  // namespace ava
