// A second row beside a row of logits: a weight q_j for every column (kTargetProbabilities, kSmoothingWeights). Included
// by softmax_rows_kernels.h; rows without it run none of this. The formulas are in softmax_rows.h.
#pragma once
#include "softmax_rows_measure.h"

namespace ava {
inline namespace AVA_ISA {

struct NoColumnWeights {
  static constexpr bool kPresent = false, kInOrder = false;
};

// q of one row, in the type Weight: that of the logits, Element, or float32 beside narrower ones.
template <class Vector, class Element, class Weight>
struct ColumnWeights {
  using V = Vector;
  using Register = typename Vector::Register;
  static constexpr int kLanes = Vector::kLanes;
  static constexpr bool kPresent = true;
  static constexpr bool kInOrder = sizeof(Weight) != sizeof(Element);  // the halves of a pair must then be in order

  const Weight* q;
  const Weight* next;  // of the row after this one; may be null

  static Register load_part(const Weight* from, int64_t n) {  // zeros behind the n-th
    Weight buffer[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane < n)
        buffer[lane] = from[lane];
      else
        narrow(typename Vector::Value(0), buffer + lane);
    }
    return V::load(buffer);
  }
  Register load(int64_t at, int64_t n) const { return n < kLanes ? load_part(q + at, n) : V::load(q + at); }
};
// Two registers from p on, in the order in which both kinds of row can be had.
template <class V, bool kInOrder, class Element>
inline typename V::Pair load_pair_of(const Element* p) {
  if constexpr (kInOrder)
    return {V::load(p), V::load(p + V::kLanes)};
  else
    return V::load_pair(p);
}

// The sums over the weights of the columns of one row. Taken once the maximum is known, while the logits are in cache:
// against any other reference, sum q_j u_j would be what two large numbers leave where the model is sure.
template <class Element, class Reader, class Weights>
inline ColumnWeightSums<typename Reader::Real> sum_column_weights(const Reader& reader, const Element* x,
                                                                  const Weights& weights,
                                                                  const RowStatistics<typename Reader::Real>& row) {
  using V = typename Reader::V;
  using Real = typename Reader::Real;
  using Register = typename Reader::Register;
  constexpr int kLanes = Reader::kLanes;
  const int64_t n = reader.arguments.vocab_size, argmax = int64_t(row.argmax);
  const bool are_probabilities = reader.arguments.flags & kTargetProbabilities;
  if (row.count == 0) return {Real(0), Real(0), are_probabilities ? -Real(INFINITY) : Real(0)};
  const Register max = V::set(row.max), zero = V::set(Real(0)), masked = V::set(-Real(INFINITY));
  double total = 0, weighted = 0;
  for (int64_t begin = 0; begin < n; begin += Reader::kBlock) {
    const int64_t end = begin + Reader::kBlock < n ? begin + Reader::kBlock : n;
    Register totals[4] = {zero, zero, zero, zero}, products[4] = {zero, zero, zero, zero};
    const auto add = [&](int lane, Register logits, Register q) {
      const Register d = V::sub(reader.effective(logits), max);
      if (!are_probabilities) q = V::keep(V::not_equal(d, masked), q);
      totals[lane] = V::add(totals[lane], q);
      // 0 times the -inf of a masked column is 0
      products[lane] = V::add(products[lane], V::keep(V::not_equal(q, zero), V::mul(q, d)));
    };
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int k = 0; k < 4; k += 2) {
        const int64_t at = i + k * kLanes;
        const auto logits = load_pair_of<V, Weights::kInOrder>(x + at);
        const auto q = load_pair_of<V, Weights::kInOrder>(weights.q + at);
        add(k, logits.first, q.first);
        add(k + 1, logits.second, q.second);
      }
    for (; i < end; i += kLanes) {
      const int64_t left = end - i;
      add(0, left < kLanes ? Reader::load_part(x + i, left) : V::load(x + i), weights.load(i, left));
    }
    total += V::total(V::add(V::add(totals[0], totals[1]), V::add(totals[2], totals[3])));
    weighted += V::total(V::add(V::add(products[0], products[1]), V::add(products[2], products[3])));
  }
  ColumnWeightSums<Real> sums{Real(total), Real(0), Real(weighted * double(reader.inverse_temperature))};
  if (argmax < 0) return sums;
  sums.at_maximum = widen(weights.q[argmax]);
  sums.rest = Real(total - double(sums.at_maximum));
  if (sums.rest < Real(1e-3) * Real(total)) {  // where i* has nearly all, that is what a subtraction loses
    double rest = 0;
    for (int64_t column = 0; column < n; ++column)
      if (column != argmax && (are_probabilities || widen(x[column]) != -Real(INFINITY)))
        rest += widen(weights.q[column]);
    sums.rest = Real(rest);
  }
  return sums;
}

}  // namespace AVA_ISA
}  // namespace ava
