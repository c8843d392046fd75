// What the operators do with one row after another: measure it, evaluate the terms, write the gradient. Included once
// by each softmax_rows_<isa>.cpp, which defines AVA_ISA and brings VectorFloat. The formulas are in softmax_rows.h.
#pragma once
#include "softmax_rows_columns.h"
#include "softmax_rows_entries.h"

namespace ava {
inline namespace AVA_ISA {

template <class Vector, class Element, bool kDense, bool kCapped>
struct RowKernel : RowReader<Vector, Element, kDense, kCapped> {
  using Reader = RowReader<Vector, Element, kDense, kCapped>;
  using V = Vector;
  using Real = typename Vector::Value;
  using Register = typename Vector::Register;
  using Capped = typename Reader::Capped;
  using Reader::arguments, Reader::options, Reader::inverse_temperature, Reader::exponential, Reader::capped;
  using Reader::load_part, Reader::store_part, Reader::measure, Reader::measure_apart, Reader::Reader;
  using Entry = RowEntry<Real>;
  using Entries = RowEntries<Real>;
  static constexpr int kLanes = Vector::kLanes;

  // The gradient of every column, as if none had an s_c of its own. kMasked: there are -inf among the logits. `next` is
  // the row after this one, fetched meanwhile.
  // kSloped: b or k is not 0.
  // weights: of the columns, each of which has s = factor q.
  template <bool kMasked, bool kSloped, class Weights = NoColumnWeights>
  void differentiate(const Element* x, Element* out, const RowStatistics<Real>& row, const DenseGradient<Real>& dense,
                     const Element* next, const Weights& weights = {}, Real factor = 0) const {
    const Register max = V::set(row.max), scale = V::set(dense.factor), slope = V::set(dense.slope),
                   constant = V::set(dense.constant), lowest = V::set(lowest_u<Real>() * options.temperature),
                   of_weight = V::set(factor * inverse_temperature);
    const auto gradient = [&](Register logits, Register q) {
      Register value = logits, cap_slope;
      if constexpr (kCapped) {
        const Capped both = capped(logits);
        value = both.value, cap_slope = both.slope;
      }
      const Register d = V::sub(value, max), e = exponential(d);
      if constexpr (!kSloped) return V::mul(e, scale);
      Register g = V::fma(e, V::fma(slope, V::max(lowest, d), scale), constant);  // a nan passes
      if constexpr (Weights::kPresent) g = V::fma(q, of_weight, g);
      if constexpr (kMasked) g = V::keep(V::not_equal(d, V::set(-Real(INFINITY))), g);
      if constexpr (kCapped) g = V::mul(g, cap_slope);
      return g;
    };
    const auto gradient_of_part = [&](int64_t at, int64_t n) {
      Register q = constant;
      if constexpr (Weights::kPresent) q = weights.load(at, n);
      store_part(out + at, n, gradient(n < kLanes ? load_part(x + at, n) : V::load(x + at), q));
    };
    const int64_t n = arguments.vocab_size;
    const int64_t bytes_to_alignment = (64 - int64_t(reinterpret_cast<uintptr_t>(out) & 63)) & 63;
    const int64_t to_alignment = bytes_to_alignment / int64_t(sizeof(Element)),
                  head = to_alignment < n ? to_alignment : n;
    int64_t i = 0;
    for (; i < head; i += kLanes) gradient_of_part(i, head - i < kLanes ? head - i : kLanes);
    i = head;
    const auto in_pairs = [&](auto store) {
      for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        if (next) {
          V::prefetch(next + i);
          if (sizeof(Element) * kLanes >= 64) V::prefetch(next + i + kLanes);
        }
        const auto pair = load_pair_of<V, Weights::kInOrder>(x + i);
        auto q = pair;
        if constexpr (Weights::kPresent) {
          if (weights.next) {
            V::prefetch(weights.next + i);
            if (sizeof(*weights.next) * kLanes >= 64) V::prefetch(weights.next + i + kLanes);
          }
          q = load_pair_of<V, Weights::kInOrder>(weights.q + i);
        }
        store(out + i, typename V::Pair{gradient(pair.first, q.first), gradient(pair.second, q.second)});
      }
    };
    if constexpr (Weights::kInOrder)
      in_pairs([](Element* p, typename V::Pair pair) { V::store(p, pair.first), V::store(p + kLanes, pair.second); });
    else if (arguments.stream)
      in_pairs([](Element* p, typename V::Pair pair) { V::stream_pair(p, pair); });
    else
      in_pairs([](Element* p, typename V::Pair pair) { V::store_pair(p, pair); });
    for (; i < n; i += kLanes) gradient_of_part(i, n - i < kLanes ? n - i : kLanes);
    if (arguments.stream) V::end_of_stream();
    zero(out + n, arguments.n_columns - n);
  }
  static void zero(Element* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) narrow(Real(0), out + i);
  }

  Real scalar_u(const Element* x, int64_t column, const RowStatistics<Real>& row) const {
    if (column == int64_t(row.argmax)) return 0;
    Real value = widen(x[column]);
    if (value == -Real(INFINITY)) return value;
    if constexpr (kCapped) value = options.softcap * tanh_of(value / options.softcap);
    // -inf is for masked columns: beside a maximum of +inf this is a finite distance, and R a nan
    const Real u = (value - row.max) * inverse_temperature;
    return u < lowest_finite<Real>() ? lowest_finite<Real>() : u;
  }
  Real scalar_cap_slope(const Element* x, int64_t column) const {
    if constexpr (!kCapped) return 1;
    const Real t = tanh_of(widen(x[column]) / options.softcap);
    return 1 - t * t;
  }
  bool has_column_weights() const { return kDense && arguments.column_weights; }
  // use(the weights of the columns of this row, in either type)
  template <class Use>
  void with_column_weights(int64_t r, Use use) const {
    const int64_t offset = row_offset(arguments.column_weights_layout, r);
    const int64_t next = r + 1 < arguments.n_rows ? row_offset(arguments.column_weights_layout, r + 1) : offset;
    const auto of_type = [&](auto weights, const auto* first) {
      weights.q = first + offset, weights.next = next == offset ? nullptr : first + next;
      use(weights);
    };
    if (arguments.column_weights_are_real)
      of_type(ColumnWeights<Vector, Element, Real>{}, static_cast<const Real*>(arguments.column_weights));
    else
      of_type(ColumnWeights<Vector, Element, Element>{}, static_cast<const Element*>(arguments.column_weights));
  }

  // dense gradient, then the columns with an s_c, computed before anything is written: `out` may be `x`
  void write_gradient(int64_t r, const RowStatistics<Real>& row, const RowCoefficients<Real>& coefficients,
                      Real outside,  // coefficient of p_j of the columns that kTailId does not name
                      Entries& of_row, const Element* next) const {
    const Element* x = logits_of(r);
    Element* out = gradient_of(r);
    if (row.count == 0) return zero(out, arguments.n_columns);
    Entry* const entries = of_row.entries;
    const bool is_weighted = has_column_weights();
    if constexpr (kDense)
      if (is_weighted && row.argmax >= 0)
        with_column_weights(r, [&](auto weights) {
          const int64_t argmax = int64_t(row.argmax);
          of_row.add(argmax, Real(0), 1 / (1 + row.rest), coefficients.maximum * widen(weights.q[argmax]));
        });
    const int64_t n_entries = of_row.n;
    Real others = 0, maximum = 0;  // sums of s_c: without the maximum, at the maximum
    for (int64_t k = 0; k < n_entries; ++k)
      (entries[k].column == int64_t(row.argmax) ? maximum : others) += entries[k].own;
    for (int64_t k = 0; k < n_entries; ++k) {
      Entry& entry = entries[k];
      const bool is_argmax = entry.column == int64_t(row.argmax);
      const Real elsewhere = is_argmax ? others : others - entry.own + maximum;
      Real gradient = sparse_gradient(row, coefficients, is_argmax, entry.u, entry.probability, entry.own,
                                      entry.is_named ? elsewhere : elsewhere - outside);
      if constexpr (kDense)
        if (is_weighted && !is_argmax)
          with_column_weights(r,
                              [&](auto weights) { gradient += coefficients.maximum * widen(weights.q[entry.column]); });
      const bool masked = entry.u == -Real(INFINITY);
      entry.gradient = masked ? Real(0) : gradient * inverse_temperature * scalar_cap_slope(x, entry.column);
    }
    const DenseGradient<Real> dense =
        dense_gradient(row, coefficients, others + maximum - outside, inverse_temperature);
    // without b and k, e = 0 is all that a masked column needs
    if constexpr (!kDense)
      differentiate<false, false>(x, out, row, dense, next);
    else if (is_weighted)
      with_column_weights(r, [&](auto weights) {
        this->template differentiate<true, true>(x, out, row, dense, next, weights, coefficients.maximum);
      });
    else if (!kCapped && dense.slope == 0 && dense.constant == 0)
      differentiate<false, kCapped>(x, out, row, dense, next);
    else if (row.count == Real(arguments.vocab_size))
      differentiate<false, true>(x, out, row, dense, next);
    else
      differentiate<true, true>(x, out, row, dense, next);
    for (int64_t k = 0; k < n_entries; ++k) narrow(entries[k].gradient, out + entries[k].column);
  }

  const Element* logits_of(int64_t row) const {
    return static_cast<const Element*>(arguments.logits) + row_offset(arguments.logits_layout, row);
  }
  Element* gradient_of(int64_t row) const {
    return static_cast<Element*>(arguments.grad_logits) + row_offset(arguments.grad_layout, row);
  }

  void row_loss(int64_t row_begin, int64_t row_end, Entries entries) const {
    const int64_t n_ids = arguments.n_ids, n_rows = arguments.n_rows;
    auto* row_loss = static_cast<Real*>(arguments.row_loss);
    auto* terms = static_cast<Real*>(arguments.row_terms);
    auto* statistics = static_cast<RowStatistics<Real>*>(arguments.statistics);
    auto* row_coefficients = static_cast<Real*>(arguments.row_coefficients);
    for (int64_t r = row_begin; r < row_end; ++r) {
      const int64_t target = arguments.targets[r];
      RowEvaluation<Real> evaluation{};
      RowStatistics<Real> row = empty_statistics<Real>();
      const int32_t* ids = arguments.ids + r * n_ids;
      const Real* weights = static_cast<const Real*>(arguments.id_values) + r * n_ids;
      const Real row_weight = arguments.row_weights ? static_cast<const Real*>(arguments.row_weights)[r] : Real(1);
      Real* own_coefficients = row_coefficients ? row_coefficients + r * (kRowCoefficients + 1 + n_ids) : nullptr;
      entries.clear();
      Real total = 0, outside = 0;
      const Element* x = logits_of(r);
      const bool counts = target != arguments.ignore_index;
      // place of kTailId, where soft targets leave something
      const bool has_soft = arguments.flags & kSoftTargets && arguments.n_groups > 0;
      const int64_t first_soft = has_soft ? n_ids - arguments.group_sizes[arguments.n_groups - 1] : n_ids;
      const bool has_tail = counts && arguments.flags & kTail && first_soft < n_ids && ids[first_soft] == kTailId &&
                            weights[first_soft] != 0;
      Real tail_mass = 0;
      if (counts) {
        row = has_tail ? measure_apart(x, {ids + first_soft + 1, n_ids - first_soft - 1}, entries, &tail_mass)
                       : measure(x);
        const int64_t argmax = int64_t(row.argmax);
        const Real target_u = scalar_u(x, target, row);
        const Real target_weight = arguments.flags & kTargetProbabilities ? Real(0)
                                   : arguments.flags & kTargetWeights     ? weights[0]
                                                                          : Real(1);
        const int64_t flags = flags_beside_column_weights(arguments.flags);
        evaluation = evaluate(row, options, flags, target == argmax, target_u, target_weight);
        if constexpr (kDense)
          if (has_column_weights())
            with_column_weights(r, [&](auto of_columns) {
              const auto sums = sum_column_weights(*static_cast<const Reader*>(this), x, of_columns, row);
              add_column_weights(row, options, arguments.flags, sums, evaluation);
            });
        evaluation.target_coefficient *= row_weight;
        const Real probability = exp_of(target_u) / (1 + row.rest);
        entries.add(target, target_u, probability, evaluation.target_coefficient);
        if (own_coefficients) own_coefficients[kRowCoefficients] = evaluation.target_coefficient;
        total = evaluation.terms[kMainLoss] + evaluation.terms[kZLossTerm] + evaluation.terms[kConfidencePenaltyTerm];
      } else if (own_coefficients) {
        own_coefficients[kRowCoefficients] = 0;
      }
      const Real total_log = log_total(row);
      for (int64_t group = 0, k = 0; group < arguments.n_groups; ++group) {
        const bool is_soft = arguments.flags & kSoftTargets && group == arguments.n_groups - 1;
        Real penalty = 0;
        const bool is_named = has_tail && is_soft;  // of the ids of this group
        for (const int64_t last = k + arguments.group_sizes[group]; k < last; ++k) {
          CandidateShare<Real> share{0, 0};
          const int64_t column = ids[k];
          if (is_named && column >= 0) {
            if (weights[k] != 0) {  // else a class that the tail does not have either
              Entry* const entry = entries.find(column);
              share = soft_target(total_log, entry->u, weights[k]);
              penalty += share.loss;
              entry->own += share.log_prob_coefficient * row_weight;
            }
          } else if (counts && column >= 0 && (is_soft || column != target) && weights[k] != 0) {
            const bool is_argmax = column == int64_t(row.argmax);
            const Real u = scalar_u(x, column, row);
            if (is_soft || u > -Real(INFINITY) || u != u) {  // a masked column has p = 0: nothing to push down
              const Real probability = exp_of(u) / (1 + row.rest);
              share = is_soft ? soft_target(total_log, u, weights[k])
                              : unlikelihood(row, is_argmax, probability, weights[k]);
              penalty += share.loss;
              entries.add(column, u, probability, share.log_prob_coefficient * row_weight);
            }
          }
          if (own_coefficients) own_coefficients[kRowCoefficients + 1 + k] = share.log_prob_coefficient * row_weight;
        }
        if (is_named) {
          const TailShare<Real> share = tail_share(row, tail_mass, weights[first_soft]);
          penalty += share.loss;
          evaluation.coefficients.probability += share.probability;
          outside = share.outside * row_weight;
          if (own_coefficients) own_coefficients[kRowCoefficients + 1 + first_soft] = outside;
        }
        terms[(kRowTerms + group) * n_rows + r] = penalty;
        total += penalty;
      }
      if (arguments.flags & kRanks) {
        Real* const ranks = terms + (kRowTerms + arguments.n_groups) * n_rows + r;
        // a soft cap makes equals of greater logits
        const bool is_greatest = !kCapped && target == int64_t(row.argmax);
        ranks[kRankMetric * n_rows] = !counts ? Real(0) : is_greatest ? Real(1) : 1 + this->rank_of(x, target);
        ranks[kArgmaxMetric * n_rows] = counts ? 1 + row.argmax : Real(0);
      }
      for (int term = 0; term < kRowTerms; ++term) terms[term * n_rows + r] = evaluation.terms[term];
      row_loss[r] = counts ? total * row_weight : Real(0);
      evaluation.coefficients.probability *= row_weight;
      evaluation.coefficients.entropy *= row_weight;
      evaluation.coefficients.constant *= row_weight;
      evaluation.coefficients.maximum *= row_weight;
      if (statistics)
        statistics[r] = row, *reinterpret_cast<RowCoefficients<Real>*>(own_coefficients) = evaluation.coefficients;
      if (arguments.grad_logits)
        write_gradient(r, row, evaluation.coefficients, outside, entries, r + 1 < row_end ? logits_of(r + 1) : nullptr);
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
        if (coefficients.maximum != 0 && row.argmax >= 0 && !has_column_weights())
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
