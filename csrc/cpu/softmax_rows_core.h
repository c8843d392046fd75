// Measures and differentiates one row of logits with the vector operations of one instruction set. Included once by each
// softmax_rows_<isa>.cpp, which defines AVA_ISA and brings VectorFloat. The formulas are in softmax_rows.h.
//
// measure() reads the row in blocks. Each block is summed against a reference that was near the maximum when the block began
// (no pass of its own to find the maximum); only when a block's maximum is far above is it summed again. The sums of the block
// that holds the maximum are then taken again without it, against the exact maximum: that gives R.
#pragma once
#include "../softmax_rows.h"
#include "softmax_rows_kernels.h"
#include "vector_double.h"

namespace ava {
inline namespace AVA_ISA {

// e^{d factor ln 2}: 2^n p(f), n = round(d factor), |f| <= 1/2, p of degree 5 (relative error 2.4e-7). d is at least `floor`,
// where the result is 0; a nan stays one. The product is rounded once only, in f: far from the maximum that matters.
template <class Vector>
inline typename Vector::Register exp_of_difference(typename Vector::Register d, typename Vector::Register factor,
                                                   typename Vector::Register floor) {
  using V = Vector;
  const auto magic = V::set(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  d = V::max(floor, d);
  const auto shifted = V::fma(d, factor, magic), n = V::sub(shifted, magic);
  const auto f = V::fma(d, factor, V::sub(V::set(0.f), n));
  auto p = V::fma(V::set(0.0013276472454890609f), f, V::set(0.009675540961325169f));
  p = V::fma(p, f, V::set(0.05550713092088699f));
  p = V::fma(p, f, V::set(0.24022120237350464f));
  p = V::fma(p, f, V::set(0.6931469440460205f));
  p = V::fma(p, f, V::set(1.f));
  return V::scale_by_power(p, n, shifted);
}
template <>
inline double exp_of_difference<VectorDouble>(double d, double factor, double) {
  return exp_of(d * factor);
}

// tanh: odd polynomial below 0.625 (Cephes), (1 - e^-2y) / (1 + e^-2y) above; error below 2 ulp.
template <class Vector>
inline typename Vector::Register tanh_of_vector(typename Vector::Register x) {
  using V = Vector;
  const auto y = V::abs(x), square = V::mul(x, x), one = V::set(1.f);
  auto p = V::fma(V::set(-5.70498872745e-3f), square, V::set(2.06390887954e-2f));
  p = V::fma(p, square, V::set(-5.37397155531e-2f));
  p = V::fma(p, square, V::set(1.33314422036e-1f));
  p = V::fma(p, square, V::set(-3.33332819422e-1f));
  const auto small = V::fma(V::mul(p, square), x, x);
  const auto power = exp_of_difference<V>(V::mul(y, V::set(-2.f)), V::set(1.4426950408889634f), V::set(-80.f));
  const auto large = V::copy_sign(V::div(V::sub(one, power), V::add(one, power)), x);
  return V::select(V::less(y, V::set(0.625f)), small, large);
}
template <>
inline double tanh_of_vector<VectorDouble>(double x) {
  return tanh_of(x);
}

template <class Vector, class Element, bool kDense, bool kCapped>
struct RowKernel {
  using V = Vector;
  using Real = typename Vector::Value;
  using Register = typename Vector::Register;
  static constexpr int kLanes = Vector::kLanes;
  static constexpr int64_t kBlock = 64 * kLanes;
  static constexpr bool kIsDouble = sizeof(Real) == 8;

  const SoftmaxRowsArguments& arguments;
  const RowOptions<Real> options;
  const Real inverse_temperature = 1 / options.temperature;
  // what exp_of_difference wants: log2(e) / T and the difference where e^(d / T) is 0
  const Real factor = kIsDouble ? inverse_temperature : Real(1.4426950408889634) * inverse_temperature;
  const Real floor = smallest_power() / factor;

  explicit RowKernel(const SoftmaxRowsArguments& all)
      : arguments(all), options(*static_cast<const RowOptions<Real>*>(all.options)) {}

  static Real smallest_power() {
    if constexpr (kIsDouble)
      return 0;
    else
      return Vector::kSmallestPower;
  }

  Register exponential(Register d) const { return exp_of_difference<Vector>(d, V::set(factor), V::set(floor)); }

  // softcap(x), and its derivative; a raw -inf stays -inf, with derivative 0
  struct Capped {
    Register value, slope;
  };
  Capped capped(Register x) const {
    const auto present = V::not_equal(x, V::set(-Real(INFINITY)));
    const Register t = tanh_of_vector<Vector>(V::mul(x, V::set(1 / options.softcap)));
    return {V::select(present, V::mul(V::set(options.softcap), t), V::set(-Real(INFINITY))),
            V::keep(present, V::sub(V::set(Real(1)), V::mul(t, t)))};
  }
  Register effective(Register x) const {
    if constexpr (kCapped)
      return capped(x).value;
    else
      return x;
  }

  // the first n < kLanes elements, -inf behind them
  static Register load_part(const Element* x, int64_t n) {
    Element buffer[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane < n)
        buffer[lane] = x[lane];
      else
        narrow(-Real(INFINITY), buffer + lane);
    }
    return V::load(buffer);
  }
  static void store_part(Element* out, int64_t n, Register v) {
    Element buffer[kLanes];
    V::store(buffer, v);
    for (int64_t lane = 0; lane < n; ++lane) out[lane] = buffer[lane];
  }

  // Sums over some columns, with d = value - reference in logits (not yet divided by T) and e = e^(d / T).
  struct Lanes {
    Register max, rest, weighted, sum, count;
  };
  static Lanes no_lanes() {
    return {V::set(-Real(INFINITY)), V::set(Real(0)), V::set(Real(0)), V::set(Real(0)), V::set(Real(0))};
  }
  void add(Lanes& lanes, Register value, Register reference) const {
    const Register d = V::sub(value, reference), e = exponential(d);
    lanes.max = V::max(lanes.max, value);
    lanes.rest = V::add(lanes.rest, e);
    if constexpr (kDense) {
      const auto present = V::not_equal(d, V::set(-Real(INFINITY)));
      const Register counted = V::keep(present, d);
      lanes.weighted = V::fma(e, counted, lanes.weighted);
      lanes.sum = V::add(lanes.sum, counted);
      lanes.count = V::add(lanes.count, V::keep(present, V::set(Real(1))));
    }
  }
  struct Sums {
    Real max;
    double rest, weighted, sum, count;  // rest: all e, the maximum included
  };
  Sums sum_block(const Element* x, int64_t begin, int64_t end, Real reference_logit) const {
    const Register reference = V::set(reference_logit);
    Lanes lanes[4] = {no_lanes(), no_lanes(), no_lanes(), no_lanes()};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k) add(lanes[k], effective(V::load(x + i + k * kLanes)), reference);
    for (; i + kLanes <= end; i += kLanes) add(lanes[0], effective(V::load(x + i)), reference);
    if (i < end) add(lanes[1], effective(load_part(x + i, end - i)), reference);
    Sums sums{V::largest(V::max(V::max(lanes[0].max, lanes[1].max), V::max(lanes[2].max, lanes[3].max))),
              V::total(V::add(V::add(lanes[0].rest, lanes[1].rest), V::add(lanes[2].rest, lanes[3].rest))), 0, 0, 0};
    if constexpr (kDense) {
      sums.weighted =
          V::total(V::add(V::add(lanes[0].weighted, lanes[1].weighted), V::add(lanes[2].weighted, lanes[3].weighted)));
      sums.sum = V::total(V::add(V::add(lanes[0].sum, lanes[1].sum), V::add(lanes[2].sum, lanes[3].sum)));
      sums.count = V::total(V::add(V::add(lanes[0].count, lanes[1].count), V::add(lanes[2].count, lanes[3].count)));
    }
    return sums;
  }
  Real largest_in(const Element* x, int64_t begin, int64_t end) const {
    Register max = V::set(-Real(INFINITY));
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) max = V::max(max, effective(V::load(x + i)));
    if (i < end) max = V::max(max, effective(load_part(x + i, end - i)));
    return V::largest(max);
  }
  int64_t first_equal(const Element* x, int64_t begin, int64_t end, Real wanted) const {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = end - i < kLanes ? end - i : kLanes;
      const Register value = effective(n < kLanes ? load_part(x + i, n) : V::load(x + i));
      if (!V::any_equal(value, V::set(wanted))) continue;
      Real values[kLanes];
      V::store(values, value);
      for (int lane = 0; lane < kLanes; ++lane)
        if (values[lane] == wanted) return i + lane;
    }
    return -1;
  }
  // sums over the columns of [begin, end) but i*
  Sums sum_without(const Element* x, int64_t begin, int64_t end, int64_t argmax, Real reference) const {
    Sums sums = sum_block(x, begin, begin + (argmax - begin) / kLanes * kLanes, reference);
    const int64_t first = begin + (argmax - begin) / kLanes * kLanes, last = first + kLanes < end ? first + kLanes : end;
    Element buffer[kLanes];
    for (int64_t i = first; i < last; ++i) buffer[i - first] = x[i];
    narrow(-Real(INFINITY), buffer + (argmax - first));
    const Sums around = sum_block(buffer, 0, last - first, reference), behind = sum_block(x, last, end, reference);
    sums.rest += around.rest + behind.rest;
    sums.weighted += around.weighted + behind.weighted;
    return sums;
  }

  // to another reference; nothing summed yet: no shift, which may be infinite, by nothing
  static void move(Sums& sums, double shift, double scale) {
    if (sums.rest == 0 && sums.count == 0) return;
    sums.weighted = scale * (sums.weighted + shift * sums.rest);
    sums.sum += shift * sums.count;
    sums.rest *= scale;
  }

  RowStatistics<Real> measure(const Element* x) const {
    constexpr Real lowest = kIsDouble ? Real(-1.7976931348623157e308) : Real(-3.4028234663852886e38f);
    const Real slack = 32 * options.temperature;  // sums up to e^32 times the block's size stay far from overflow
    Real reference = lowest;
    Sums all{-Real(INFINITY), 0, 0, 0, 0}, best{-Real(INFINITY), 0, 0, 0, 0};  // best: the block with the maximum; all: the others
    int64_t best_begin = 0, best_end = 0;
    const auto change_reference = [&](Real next) {
      const double shift = double(reference) - double(next), scale = exp_of(shift * double(inverse_temperature));
      move(all, shift, scale), move(best, shift, scale);
      reference = next;
    };
    for (int64_t begin = 0; begin < arguments.vocab_size; begin += kBlock) {
      const int64_t end = begin + kBlock < arguments.vocab_size ? begin + kBlock : arguments.vocab_size;
      if (reference == lowest) {
        const Real first = largest_in(x, begin, end);
        if (first > lowest) reference = first;
      }
      Sums sums = sum_block(x, begin, end, reference);
      if (sums.max > reference + slack) {
        change_reference(sums.max);
        sums = sum_block(x, begin, end, reference);
      }
      const bool leads = sums.max > best.max;
      const Sums& other = leads ? best : sums;
      all.rest += other.rest, all.weighted += other.weighted, all.sum += other.sum, all.count += other.count;
      if (leads) best = sums, best_begin = begin, best_end = end;
    }
    RowStatistics<Real> row = empty_statistics<Real>();
    if (!(best.max > -Real(INFINITY))) {
      row.rest = Real(all.rest);  // 0, or nan
      if (row.rest != row.rest) row.count = 1, row.max = row.rest;
      return row;
    }
    row.max = best.max;
    row.argmax = Real(first_equal(x, best_begin, best_end, row.max));
    change_reference(row.max);
    const Sums rest = sum_without(x, best_begin, best_end, int64_t(row.argmax), row.max);
    row.rest = row.max == Real(INFINITY) ? Real(NAN) : Real(all.rest + rest.rest);  // +inf logits give nan, as in torch
    row.count = 1;  // a row that is there; its columns are counted in the dense kernels only
    if constexpr (kDense) {
      row.weighted = Real((all.weighted + rest.weighted) * double(inverse_temperature));
      row.sum = Real((all.sum + best.sum) * double(inverse_temperature));
      row.count = Real(all.count + best.count);
    }
    return row;
  }

  // the gradient of every column, as if none had an s_c of its own; `next` is the row after this one, fetched meanwhile
  void differentiate(const Element* x, Element* out, const RowStatistics<Real>& row, const DenseGradient<Real>& dense,
                     const Element* next) const {
    const Register max = V::set(row.max), scale = V::set(dense.factor), slope = V::set(dense.slope), constant = V::set(dense.constant);
    const auto gradient = [&](Register logits) {
      Register value = logits, cap_slope;
      if constexpr (kCapped) {
        const Capped both = capped(logits);
        value = both.value, cap_slope = both.slope;
      }
      const Register d = V::sub(value, max), e = exponential(d);
      if constexpr (!kDense) return V::mul(e, scale);
      const auto present = V::not_equal(d, V::set(-Real(INFINITY)));
      Register g = V::keep(present, V::fma(e, V::fma(slope, d, scale), constant));
      if constexpr (kCapped) g = V::mul(g, cap_slope);
      return g;
    };
    const int64_t n = arguments.vocab_size;
    const int64_t to_alignment = int64_t((64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63) / int64_t(sizeof(Element));
    const int64_t head = to_alignment < n ? to_alignment : n;
    int64_t i = 0;
    for (; i < head; i += kLanes) {
      const int64_t part = head - i < kLanes ? head - i : kLanes;
      store_part(out + i, part, gradient(part < kLanes ? load_part(x + i, part) : V::load(x + i)));
    }
    i = head;
    const auto in_pairs = [&](auto store) {
      for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        if (next) {
          V::prefetch(next + i);
          if (sizeof(Element) * kLanes >= 64) V::prefetch(next + i + kLanes);
        }
        store(out + i, gradient(V::load(x + i)), gradient(V::load(x + i + kLanes)));
      }
    };
    if (arguments.stream)
      in_pairs([](Element* p, Register first, Register second) { V::stream_pair(p, first, second); });
    else
      in_pairs([](Element* p, Register first, Register second) { V::store_pair(p, first, second); });
    for (; i < n; i += kLanes) {
      const int64_t part = n - i < kLanes ? n - i : kLanes;
      store_part(out + i, part, gradient(part < kLanes ? load_part(x + i, part) : V::load(x + i)));
    }
    if (arguments.stream) V::end_of_stream();
    zero(out + n, arguments.n_columns - n);
  }
  static void zero(Element* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) narrow(Real(0), out + i);
  }

  // One column that has an s_c.
  struct Entry {
    int64_t column;
    Real u, own, gradient;
  };
  static_assert(sizeof(Entry) <= 32, "sparse_scratch_bytes counts 32 bytes for each");

  Real scalar_u(const Element* x, int64_t column, const RowStatistics<Real>& row) const {
    Real value = widen(x[column]);
    if (value == -Real(INFINITY)) return value;
    if constexpr (kCapped) value = options.softcap * tanh_of(value / options.softcap);
    return (value - row.max) * inverse_temperature;
  }
  Real scalar_cap_slope(const Element* x, int64_t column) const {
    if constexpr (!kCapped) return 1;
    const Real t = tanh_of(widen(x[column]) / options.softcap);
    return 1 - t * t;
  }
  // adds s to the entry of this column, or makes one
  static void add_entry(Entry* entries, int64_t& n_entries, int64_t column, Real u, Real s) {
    for (int64_t k = 0; k < n_entries; ++k)
      if (entries[k].column == column) {
        entries[k].own += s;
        return;
      }
    entries[n_entries++] = {column, u, s, 0};
  }

  // dense gradient, then the columns with an s_c, computed before anything is written: `out` may be `x`
  void write_gradient(const Element* x, Element* out, const RowStatistics<Real>& row, const RowCoefficients<Real>& coefficients,
                      Entry* entries, int64_t n_entries, const Element* next) const {
    if (row.count == 0) return zero(out, arguments.n_columns);
    Real others = 0, maximum = 0;  // sums of s_c: without the maximum, at the maximum
    for (int64_t k = 0; k < n_entries; ++k) (entries[k].column == int64_t(row.argmax) ? maximum : others) += entries[k].own;
    for (int64_t k = 0; k < n_entries; ++k) {
      Entry& entry = entries[k];
      const bool is_argmax = entry.column == int64_t(row.argmax);
      const Real u = is_argmax ? Real(0) : entry.u, probability = exp_of(u) / (1 + row.rest);
      const Real gradient = sparse_gradient(row, coefficients, is_argmax, u, probability, entry.own,
                                            is_argmax ? others : others - entry.own + maximum);
      const bool masked = entry.u == -Real(INFINITY);
      entry.gradient = masked ? Real(0) : gradient * inverse_temperature * scalar_cap_slope(x, entry.column);
    }
    differentiate(x, out, row, dense_gradient(row, coefficients, others + maximum, inverse_temperature), next);
    for (int64_t k = 0; k < n_entries; ++k) narrow(entries[k].gradient, out + entries[k].column);
  }

  const Element* logits_of(int64_t row) const {
    return static_cast<const Element*>(arguments.logits) + row_offset(arguments.logits_layout, row);
  }
  Element* gradient_of(int64_t row) const {
    return static_cast<Element*>(arguments.grad_logits) + row_offset(arguments.grad_layout, row);
  }

  void row_loss(int64_t row_begin, int64_t row_end, Entry* entries) const {
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
      Real* own_coefficients = row_coefficients ? row_coefficients + r * (5 + n_ids) : nullptr;
      int64_t n_entries = 0;
      Real total = 0;
      const Element* x = logits_of(r);
      const bool counts = target != arguments.ignore_index;
      if (counts) {
        row = measure(x);
        const int64_t argmax = int64_t(row.argmax);
        const Real target_u = scalar_u(x, target, row);
        evaluation = evaluate(row, options, arguments.flags, target == argmax, target_u);
        evaluation.target_coefficient *= row_weight;
        add_entry(entries, n_entries, target, target_u, evaluation.target_coefficient);
        if (own_coefficients) own_coefficients[4] = evaluation.target_coefficient;
        total = evaluation.terms[kMainLoss] + evaluation.terms[kZLossTerm] + evaluation.terms[kConfidencePenaltyTerm];
      } else if (own_coefficients) {
        own_coefficients[4] = 0;
      }
      for (int64_t group = 0, k = 0; group < arguments.n_groups; ++group) {
        Real penalty = 0;
        for (const int64_t last = k + arguments.group_sizes[group]; k < last; ++k) {
          CandidateShare<Real> share{0, 0};
          const int64_t column = ids[k];
          if (counts && column >= 0 && column != target && weights[k] != 0) {
            const bool is_argmax = column == int64_t(row.argmax);
            const Real u = scalar_u(x, column, row);
            if (u > -Real(INFINITY) || u != u) {  // a masked column has p = 0: nothing to push down
              share = unlikelihood(row, is_argmax, exp_of(u) / (1 + row.rest), weights[k]);
              penalty += share.loss;
              add_entry(entries, n_entries, column, u, share.log_prob_coefficient * row_weight);
            }
          }
          if (own_coefficients) own_coefficients[5 + k] = share.log_prob_coefficient * row_weight;
        }
        terms[(kRowTerms + group) * n_rows + r] = penalty;
        total += penalty;
      }
      for (int term = 0; term < kRowTerms; ++term) terms[term * n_rows + r] = evaluation.terms[term];
      row_loss[r] = counts ? total * row_weight : Real(0);
      evaluation.coefficients.probability *= row_weight;
      evaluation.coefficients.entropy *= row_weight;
      evaluation.coefficients.constant *= row_weight;
      if (statistics) statistics[r] = row, *reinterpret_cast<RowCoefficients<Real>*>(own_coefficients) = evaluation.coefficients;
      if (arguments.grad_logits)
        write_gradient(x, gradient_of(r), row, evaluation.coefficients, entries, n_entries, r + 1 < row_end ? logits_of(r + 1) : nullptr);
    }
  }

  void row_statistics(int64_t row_begin, int64_t row_end) const {
    const int64_t n_ids = arguments.n_ids, n_rows = arguments.n_rows;
    auto* summaries = static_cast<Real*>(arguments.summaries);
    for (int64_t r = row_begin; r < row_end; ++r) {
      const Element* x = logits_of(r);
      const bool measured = !arguments.row_mask || arguments.row_mask[r];
      const RowStatistics<Real> row = measured ? measure(x) : empty_statistics<Real>();
      static_cast<RowStatistics<Real>*>(arguments.statistics)[r] = row;
      if (!measured) {
        for (int summary = 0; summary < 4; ++summary) summaries[summary * n_rows + r] = 0;
        for (int64_t k = 0; k < n_ids; ++k) static_cast<Real*>(arguments.id_log_probs)[r * n_ids + k] = 0;
        continue;
      }
      const Real total = log_total(row);
      summaries[r] = total - row.weighted / (1 + row.rest);
      summaries[n_rows + r] = row.max * inverse_temperature + total;
      summaries[2 * n_rows + r] = log_of(row.rest);
      summaries[3 * n_rows + r] = row.sum / row.count - total;
      for (int64_t k = 0; k < n_ids; ++k) {
        const int64_t column = arguments.ids[r * n_ids + k];
        Real& log_prob = static_cast<Real*>(arguments.id_log_probs)[r * n_ids + k];
        log_prob = column < 0 ? Real(0) : column == int64_t(row.argmax) ? -total : scalar_u(x, column, row) - total;
      }
    }
  }

  void row_gradient(int64_t row_begin, int64_t row_end, Entry* entries) const {
    const int64_t n_ids = arguments.n_ids;
    for (int64_t r = row_begin; r < row_end; ++r) {
      const Element* x = logits_of(r);
      const RowStatistics<Real>& row = static_cast<const RowStatistics<Real>*>(arguments.statistics)[r];
      const Real* own_coefficients = static_cast<const Real*>(arguments.row_coefficients) + r * (4 + n_ids);
      const auto& coefficients = *reinterpret_cast<const RowCoefficients<Real>*>(own_coefficients);
      int64_t n_entries = 0;
      if (row.count != 0) {
        if (coefficients.maximum != 0 && row.argmax >= 0)
          add_entry(entries, n_entries, int64_t(row.argmax), Real(0), coefficients.maximum);
        for (int64_t k = 0; k < n_ids; ++k) {
          const int64_t column = arguments.ids[r * n_ids + k];
          const Real s = own_coefficients[4 + k];
          if (column >= 0 && s != 0) add_entry(entries, n_entries, column, scalar_u(x, column, row), s);
        }
      }
      write_gradient(x, gradient_of(r), row, coefficients, entries, n_entries, r + 1 < row_end ? logits_of(r + 1) : nullptr);
    }
  }
};

template <class Vector, class Element>
static void scale_rows(const SoftmaxRowsArguments& arguments, int64_t row_begin, int64_t row_end) {
  using Real = typename Vector::Value;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Real weight = static_cast<const Real*>(arguments.row_weights)[r];
    if (weight == 1) continue;
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
  auto* entries = static_cast<typename Kernel::Entry*>(scratch);
  if constexpr (task == RowTask::loss) kernel.row_loss(row_begin, row_end, entries);
  if constexpr (task == RowTask::statistics) kernel.row_statistics(row_begin, row_end);
  if constexpr (task == RowTask::gradient) kernel.row_gradient(row_begin, row_end, entries);
}

template <RowTask task, class Vector, class Element>
static void run_rows(const SoftmaxRowsArguments& arguments, int64_t row_begin, int64_t row_end, void* scratch) {
  if constexpr (task == RowTask::scale) return scale_rows<Vector, Element>(arguments, row_begin, row_end);
  const bool dense = arguments.flags & (kLabelSmoothing | kConfidencePenalty | kEntropy);
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
