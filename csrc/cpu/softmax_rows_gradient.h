// Writes the gradient of a row that has been measured. Included once by each softmax_rows_<isa>.cpp. The formulas are in
// softmax_rows.h.
#pragma once
#include "softmax_rows_columns.h"
#include "softmax_rows_entries.h"

namespace ava {
inline namespace AVA_ISA {

template <class Vector, class Element, bool kDense, bool kCapped>
struct RowWriter : RowReader<Vector, Element, kDense, kCapped> {
  using Reader = RowReader<Vector, Element, kDense, kCapped>;
  using V = Vector;
  using Real = typename Vector::Value;
  using Register = typename Vector::Register;
  using Capped = typename Reader::Capped;
  using Reader::arguments, Reader::options, Reader::inverse_temperature, Reader::exponential, Reader::capped;
  using Reader::effective_at, Reader::load_part, Reader::store_part, Reader::measure, Reader::measure_apart;
  using Reader::Reader;
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
    // a function of its own, as GCC would have it, loads all of these again for every register
    const auto gradient = [&](Register logits, Register q) __attribute__((always_inline)) {
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
    const Real value = effective_at(x, column);
    if (value == -Real(INFINITY)) return value;
    // -inf is for masked columns: beside a maximum of +inf this is a finite distance, and R a nan
    const Real u = (value - row.max) * inverse_temperature;
    return u < lowest_finite<Real>() ? lowest_finite<Real>() : u;
  }
  Real scalar_cap_slope(const Element* x, int64_t column) const {
    if constexpr (!kCapped) return 1;
    const Real t = tanh_of(widen(x[column]) / options.softcap);
    return 1 - t * t;
  }
  // That of another rank's columns is none here.
  bool has_argmax(const RowStatistics<Real>& row) const {
    return row.argmax >= 0 && row.argmax < Real(arguments.vocab_size);
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
      if (is_weighted && has_argmax(row))
        with_column_weights(r, [&](auto weights) {
          const int64_t argmax = int64_t(row.argmax);
          of_row.add(argmax, Real(0), 1 / (1 + row.rest), coefficients.maximum * widen(weights.q[argmax]));
        });
    const int64_t n_entries = of_row.n;
    outside = bounded_coefficient(outside, options.temperature);
    Real others = 0, maximum = 0;  // sums of s_c: without the maximum, at the maximum
    for (int64_t k = 0; k < n_entries; ++k) {
      entries[k].own = bounded_coefficient(entries[k].own, options.temperature);
      (entries[k].column == int64_t(row.argmax) ? maximum : others) += entries[k].own;
    }
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
};

}  // namespace AVA_ISA
}  // namespace ava
