// What the operators do with one row after another: measure it, evaluate the terms, write the gradient. Included once
// by each softmax_rows_<isa>.cpp, which defines AVA_ISA and brings VectorFloat. The formulas are in softmax_rows.h.
#pragma once
#include "softmax_rows_gradient.h"

namespace ava {
inline namespace AVA_ISA {

template <class Vector, class Element, bool kDense, bool kCapped>
struct RowKernel : RowWriter<Vector, Element, kDense, kCapped> {
  using Writer = RowWriter<Vector, Element, kDense, kCapped>;
  using typename Writer::Entries, typename Writer::Entry, typename Writer::Reader, typename Writer::Real;
  using Writer::arguments, Writer::options, Writer::inverse_temperature, Writer::measure, Writer::measure_apart;
  using Writer::logits_of, Writer::Writer;
  using Writer::scalar_u, Writer::has_argmax, Writer::has_column_weights, Writer::with_column_weights;
  using Writer::write_gradient;

  // One row of row_loss, and what is known of it so far.
  struct Row {
    int64_t index, target;
    bool counts;  // else its loss and gradient are 0
    Real weight;
    const Element* logits;   // [vocab_size]
    const int32_t* ids;      // [n_ids]: its candidates
    const Real* id_values;   // [n_ids]
    int64_t tail;            // place of kTailId in ids, where soft targets leave something; else n_ids
    Real* own_coefficients;  // [kRowCoefficients + 1 + n_ids]: of all, of the target, of the candidates. Or nullptr
    RowStatistics<Real> statistics = empty_statistics<Real>();
    RowEvaluation<Real> evaluation{};
    Real total = 0;      // of the terms
    Real tail_mass = 0;  // sum of e^u over the columns that kTailId does not name
    Real outside = 0;    // coefficient of p_j of these columns

    void keep_coefficient(int64_t place, Real s) const {
      if (own_coefficients) own_coefficients[kRowCoefficients + place] = s;
    }
  };

  Row begin_row(int64_t r) const {
    const int64_t n_ids = arguments.n_ids, target = arguments.targets[r];
    const Real weight = arguments.row_weights ? static_cast<const Real*>(arguments.row_weights)[r] : Real(1);
    auto* coefficients = static_cast<Real*>(arguments.row_coefficients);
    if (coefficients) coefficients += r * (kRowCoefficients + 1 + n_ids);
    Row row{r,
            target,
            target != arguments.ignore_index,
            weight,
            logits_of(r),
            arguments.ids + r * n_ids,
            static_cast<const Real*>(arguments.id_values) + r * n_ids,
            n_ids,
            coefficients};
    if (row.counts && arguments.flags & kSoftTargets && arguments.n_groups > 0) {
      const int64_t first_soft = n_ids - arguments.group_sizes[arguments.n_groups - 1];
      const bool has_tail = arguments.flags & kTail && first_soft < n_ids && row.ids[first_soft] == kTailId;
      if (has_tail && row.id_values[first_soft] != 0) row.tail = first_soft;
    }
    return row;
  }

  // the statistics, and the terms that need no candidate
  void evaluate_row(Row& row, Entries& entries) const {
    const int64_t n_ids = arguments.n_ids;
    row.statistics = row.tail < n_ids ? measure_apart(row.logits, {row.ids + row.tail + 1, n_ids - row.tail - 1},
                                                      entries, &row.tail_mass)
                                      : measure(row.logits);
    const bool is_argmax = row.target == int64_t(row.statistics.argmax);
    const Real target_u = scalar_u(row.logits, row.target, row.statistics);
    const Real target_weight = arguments.flags & kTargetProbabilities ? Real(0)
                               : arguments.flags & kTargetWeights     ? row.id_values[0]
                                                                      : Real(1);
    RowEvaluation<Real>& evaluation = row.evaluation;
    evaluation = evaluate(row.statistics, options, arguments.flags, is_argmax, target_u, target_weight);
    if constexpr (kDense)
      if (has_column_weights())
        with_column_weights(row.index, [&](auto of_columns) {
          const Reader& reader = *this;
          const auto sums = sum_column_weights(reader, row.logits, of_columns, row.statistics);
          add_column_weights(row.statistics, options, arguments.flags, sums, evaluation);
        });
    evaluation.target_coefficient *= row.weight;
    entries.add(row.target, target_u, exp_of(target_u) / (1 + row.statistics.rest), evaluation.target_coefficient);
    row.total = evaluation.terms[kMainLoss] + evaluation.terms[kZLossTerm] + evaluation.terms[kConfidencePenaltyTerm];
  }

  // the loss of one candidate and its derivative by log p
  CandidateShare<Real> evaluate_candidate(const Row& row, int64_t place, bool is_soft, Real total_log,
                                          Entries& entries) const {
    const int64_t column = row.ids[place];
    const Real value = row.id_values[place];
    if (!row.counts || column < 0 || value == 0) return {0, 0};
    if (is_soft && row.tail < arguments.n_ids) {  // measured with the tail
      Entry* const entry = entries.find_or_claim(column);
      const CandidateShare<Real> share = soft_target(total_log, entry->u, value);
      entry->own += share.log_prob_coefficient * row.weight;
      return share;
    }
    if (!is_soft && column == row.target) return {0, 0};
    const Real u = scalar_u(row.logits, column, row.statistics);
    if (!is_soft && u == -Real(INFINITY)) return {0, 0};  // a masked column has p = 0: nothing to push down
    const Real probability = exp_of(u) / (1 + row.statistics.rest);
    const bool is_argmax = column == int64_t(row.statistics.argmax);
    const CandidateShare<Real> share =
        is_soft ? soft_target(total_log, u, value) : unlikelihood(row.statistics, is_argmax, probability, value);
    entries.add(column, u, probability, share.log_prob_coefficient * row.weight);
    return share;
  }

  // the candidates of the groups, a term each
  void evaluate_groups(Row& row, Entries& entries) const {
    auto* const terms = static_cast<Real*>(arguments.row_terms) + kRowTerms * arguments.n_rows + row.index;
    const Real total_log = log_total(row.statistics);
    for (int64_t group = 0, k = 0; group < arguments.n_groups; ++group) {
      const bool is_soft = arguments.flags & kSoftTargets && group == arguments.n_groups - 1;
      Real penalty = 0;
      for (const int64_t last = k + arguments.group_sizes[group]; k < last; ++k) {
        const CandidateShare<Real> share = evaluate_candidate(row, k, is_soft, total_log, entries);
        penalty += share.loss;
        row.keep_coefficient(1 + k, bounded_coefficient(share.log_prob_coefficient * row.weight, Real(1)));
      }
      if (is_soft && row.tail < arguments.n_ids) {
        const TailShare<Real> share = tail_share(row.statistics, row.tail_mass, row.id_values[row.tail]);
        penalty += share.loss;
        row.evaluation.coefficients.probability += share.probability;
        row.outside = share.outside * row.weight;
        row.keep_coefficient(1 + row.tail, bounded_coefficient(row.outside, Real(1)));
      }
      terms[group * arguments.n_rows] = penalty;
      row.total += penalty;
    }
  }

  void store_rank(const Row& row) const {
    const int64_t n_rows = arguments.n_rows;
    Real* const ranks = static_cast<Real*>(arguments.row_terms) + (kRowTerms + arguments.n_groups) * n_rows + row.index;
    const Real argmax = row.statistics.argmax;
    // a soft cap makes equals of greater logits
    const bool is_greatest = !kCapped && row.target == int64_t(argmax);
    ranks[kRankMetric * n_rows] = !row.counts   ? Real(0)
                                  : is_greatest ? Real(1)
                                                : 1 + this->rank_of(row.logits, row.target);
    ranks[kArgmaxMetric * n_rows] = row.counts ? 1 + argmax : Real(0);
  }

  void row_loss(int64_t row_begin, int64_t row_end, Entries entries) const {
    auto* const terms = static_cast<Real*>(arguments.row_terms);
    for (int64_t r = row_begin; r < row_end; ++r) {
      Row row = begin_row(r);
      entries.clear();
      if (row.counts) evaluate_row(row, entries);
      row.keep_coefficient(0, row.evaluation.target_coefficient);
      evaluate_groups(row, entries);
      if (arguments.flags & kRanks) store_rank(row);
      for (int term = 0; term < kRowTerms; ++term) terms[term * arguments.n_rows + r] = row.evaluation.terms[term];
      static_cast<Real*>(arguments.row_loss)[r] = row.counts ? row.total * row.weight : Real(0);
      RowCoefficients<Real> coefficients = row.evaluation.coefficients;
      coefficients.probability *= row.weight;
      coefficients.entropy *= row.weight;
      coefficients.constant *= row.weight;
      coefficients.maximum *= row.weight;
      if (arguments.statistics) {
        static_cast<RowStatistics<Real>*>(arguments.statistics)[r] = row.statistics;
        *reinterpret_cast<RowCoefficients<Real>*>(row.own_coefficients) = coefficients;
      }
      const Element* next = r + 1 < row_end ? logits_of(r + 1) : nullptr;
      if (arguments.grad_logits) write_gradient(r, row.statistics, coefficients, row.outside, entries, next);
    }
  }

  void row_statistics(int64_t row_begin, int64_t row_end, Entries entries) const {
    const int64_t n_ids = arguments.n_ids, n_rows = arguments.n_rows;
    auto* summaries = static_cast<Real*>(arguments.summaries);
    for (int64_t r = row_begin; r < row_end; ++r) {
      const Element* x = logits_of(r);
      const bool measured = !arguments.row_mask || arguments.row_mask[r];
      const int32_t* ids = arguments.ids + r * n_ids;
      int64_t tail = 0;  // place of kTailId
      while (tail < n_ids && (!(arguments.flags & kTail) || ids[tail] != kTailId)) ++tail;
      Real tail_mass = 0;
      entries.clear();
      RowStatistics<Real> row = empty_statistics<Real>();
      if (measured)
        row = tail < n_ids ? measure_apart(x, {ids + tail + 1, n_ids - tail - 1}, entries, &tail_mass) : measure(x);
      static_cast<RowStatistics<Real>*>(arguments.statistics)[r] = row;
      if (!measured) {
        for (int summary = 0; summary < kRowSummaries; ++summary) summaries[summary * n_rows + r] = 0;
        for (int64_t k = 0; k < n_ids; ++k) static_cast<Real*>(arguments.id_log_probs)[r * n_ids + k] = 0;
        continue;
      }
      const Real total = log_total(row);
      summaries[kEntropySummary * n_rows + r] = total - row.weighted / (1 + row.rest);
      summaries[kLseSummary * n_rows + r] = row.max * inverse_temperature + total;
      summaries[kLogRestSummary * n_rows + r] = log_of(row.rest);
      summaries[kMeanLogProbSummary * n_rows + r] = row.sum / row.count - total;
      Real* log_probs = static_cast<Real*>(arguments.id_log_probs) + r * n_ids;
      for (int64_t k = 0; k < n_ids; ++k) log_probs[k] = ids[k] < 0 ? Real(0) : scalar_u(x, ids[k], row) - total;
      if (tail < n_ids) log_probs[tail] = log_of(tail_mass) - total;
    }
  }

  void row_gradient(int64_t row_begin, int64_t row_end, Entries entries) const {
    const int64_t n_ids = arguments.n_ids;
    for (int64_t r = row_begin; r < row_end; ++r) {
      const Element* x = logits_of(r);
      const RowStatistics<Real>& row = static_cast<const RowStatistics<Real>*>(arguments.statistics)[r];
      const Real* own_coefficients =
          static_cast<const Real*>(arguments.row_coefficients) + r * (kRowCoefficients + n_ids);
      const auto& coefficients = *reinterpret_cast<const RowCoefficients<Real>*>(own_coefficients);
      entries.clear();
      Real outside = 0;
      if (row.count != 0) {
        if (coefficients.maximum != 0 && has_argmax(row) && !has_column_weights())
          entries.add(int64_t(row.argmax), Real(0), 1 / (1 + row.rest), coefficients.maximum);
        for (int64_t k = 0; k < n_ids; ++k) {
          const int64_t column = arguments.ids[r * n_ids + k];
          const Real s = own_coefficients[kRowCoefficients + k];
          if (column == kTailId) outside = s;
          if (column < 0 || (s == 0 && outside == 0)) continue;
          const Real u = scalar_u(x, column, row);
          entries.add(column, u, exp_of(u) / (1 + row.rest), s, outside != 0);
        }
      }
      write_gradient(r, row, coefficients, outside, entries, r + 1 < row_end ? logits_of(r + 1) : nullptr);
    }
  }
};

template <class Vector, class Element>
static void scale_rows(const SoftmaxRowsArguments& arguments, int64_t row_begin, int64_t row_end) {
  using Real = typename Vector::Value;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Real weight = static_cast<const Real*>(arguments.row_weights)[r];
    if (weight == 1 || (arguments.targets && arguments.targets[r] == arguments.ignore_index)) continue;
    auto* row = static_cast<Element*>(arguments.grad_logits) + row_offset(arguments.grad_layout, r);
    const int64_t n = arguments.n_columns;
    int64_t i = 0;
    for (; i + Vector::kLanes <= n; i += Vector::kLanes)
      Vector::store(row + i, Vector::mul(Vector::load(row + i), Vector::set(weight)));
    for (; i < n; ++i) narrow(widen(row[i]) * weight, row + i);
  }
}

enum class RowTask { loss, statistics, gradient, scale };

template <RowTask task, class Kernel>
static void run_kernel(const SoftmaxRowsArguments& arguments, int64_t row_begin, int64_t row_end, void* scratch) {
  const Kernel kernel(arguments);
  const typename Kernel::Entries entries(scratch, arguments.n_ids);
  if constexpr (task == RowTask::loss) kernel.row_loss(row_begin, row_end, entries);
  if constexpr (task == RowTask::statistics) kernel.row_statistics(row_begin, row_end, entries);
  if constexpr (task == RowTask::gradient) kernel.row_gradient(row_begin, row_end, entries);
}

template <RowTask task, class Vector, class Element>
static void run_rows(const SoftmaxRowsArguments& arguments, int64_t row_begin, int64_t row_end, void* scratch) {
  if constexpr (task == RowTask::scale) return scale_rows<Vector, Element>(arguments, row_begin, row_end);
  const bool dense = arguments.flags & kDenseFlags;
  if (arguments.flags & kSoftcap)
    run_kernel<task, RowKernel<Vector, Element, true, true>>(arguments, row_begin, row_end, scratch);
  else if (dense)
    run_kernel<task, RowKernel<Vector, Element, true, false>>(arguments, row_begin, row_end, scratch);
  else
    run_kernel<task, RowKernel<Vector, Element, false, false>>(arguments, row_begin, row_end, scratch);
}

template <RowTask task>
static void rows_of_type(const SoftmaxRowsArguments& arguments, int64_t row_begin, int64_t row_end, void* scratch) {
  switch (arguments.element_type) {
    case ElementType::f32: return run_rows<task, VectorFloat, float>(arguments, row_begin, row_end, scratch);
    case ElementType::bf16: return run_rows<task, VectorFloat, BFloat16>(arguments, row_begin, row_end, scratch);
    case ElementType::f16: return run_rows<task, VectorFloat, Float16>(arguments, row_begin, row_end, scratch);
    case ElementType::f64: return run_rows<task, VectorDouble, double>(arguments, row_begin, row_end, scratch);
  }
}

constexpr SoftmaxRowsKernels kSoftmaxRowsKernels = {rows_of_type<RowTask::loss>, rows_of_type<RowTask::statistics>,
                                                    rows_of_type<RowTask::gradient>, rows_of_type<RowTask::scale>};

}  // namespace AVA_ISA
}  // namespace ava
