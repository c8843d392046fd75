// Reads rows of a router with the vector operations of one instruction set: softmax statistics and choices of one row.
// Included by router_rows_kernels.h. The formulas are in router_rows.h.
#pragma once
#include "../router_rows.h"
#include "router_rows_arguments.h"
#include "vector_double.h"

namespace ava {
inline namespace AVA_ISA {

// log sigmoid. log1p(t), t = e^-|z| <= 1, by 2 atanh(s), s = t / (2 + t) <= 1/3, to s^13 (relative error below 3e-7)
template <class Vector>
inline typename Vector::Register log_sigmoid_of_vector(typename Vector::Register z) {
  using V = Vector;
  const auto t = V::exponential(V::abs(z), V::set(-1.4426950408889634f)), s = V::div(t, V::add(t, V::set(2.f)));
  const auto square = V::mul(s, s);
  auto series = V::set(1.f / 13);
  for (int power = 11; power >= 1; power -= 2) series = V::fma(series, square, V::set(1.f / float(power)));
  return V::fnma(V::add(s, s), series, V::sub(z, V::max(V::set(0.f), z)));
}
template <>
inline double log_sigmoid_of_vector<VectorDouble>(double z) {
  return log_sigmoid(z);
}
template <class Vector>
inline typename Vector::Register log_sigmoid_slope_of_vector(typename Vector::Register z) {
  using V = Vector;
  const auto one = V::set(1.f), t = V::exponential(V::abs(z), V::set(-1.4426950408889634f));
  return V::div(V::select(V::less(z, V::set(0.f)), one, t), V::add(one, t));
}
template <>
inline double log_sigmoid_slope_of_vector<VectorDouble>(double z) {
  return log_sigmoid_slope(z);
}

template <class Vector, class Element, bool kSigmoid>
struct RouterReader {
  using V = Vector;
  using Real = typename Vector::Value;
  using Register = typename Vector::Register;
  static constexpr int kLanes = Vector::kLanes;
  static constexpr int kBatch = 4;  // rows that are added up at once, so that the sums are loaded and stored less often
  static constexpr int64_t kPrefetched = 1024;  // logits ahead of the one that is read
  static constexpr bool kIsDouble = sizeof(Real) == 8;

  const RouterRowsArguments& arguments;
  const RouterBlock& block;
  const int64_t n_experts = arguments.n_experts;
  const int64_t padded = (n_experts + kLanes - 1) / kLanes * kLanes;

  // vectors of `padded` Reals; those of a row have -inf, or weight 0, behind the last expert
  Real* const weights;                             // [kBatch, padded] e^u
  Real* const logits = weights + kBatch * padded;  // [kBatch, padded]
  Real* const effective = logits + kBatch * padded;
  Real* const scores = effective + padded;
  Real* const probability = scores + padded;  // of the sums; in the backward: v
  Real* const importance = probability + padded;
  int32_t* const chosen = reinterpret_cast<int32_t*>(importance + padded);  // [k]: of a row

  RouterReader(const RouterRowsArguments& all, const RouterBlock& some, void* scratch)
      : arguments(all), block(some), weights(static_cast<Real*>(scratch)) {}

  static Register exponential(Register d) {
    return V::exponential(d, V::set(Real(kIsDouble ? 1 : 1.4426950408889634)));
  }

  int64_t row_at(int64_t place) const { return arguments.order ? arguments.order[place] : place; }
  bool counts(int64_t row) const {
    return !arguments.row_mask || arguments.row_mask[block.layer * arguments.mask_stride + row];
  }
  int64_t choice_at(int64_t row, int64_t slot) const {
    const int64_t at = (block.layer * arguments.n_rows + row) * arguments.k + slot;
    return arguments.wide_indices ? arguments.wide_indices[at] : arguments.indices[at];
  }
  const Element* row_of(int64_t row) const {
    return static_cast<const Element*>(block.logits) + row_offset(*block.layout, row);
  }

  // z as Reals up to `padded`: the row itself where it is that already
  const Real* load_row(const Element* x, Real* converted) const {
    if constexpr (sizeof(Element) == sizeof(Real))
      if (padded == n_experts) return reinterpret_cast<const Real*>(x);
    int64_t i = 0;
    for (; i + kLanes <= n_experts; i += kLanes) V::store(converted + i, V::load(x + i));
    for (; i < n_experts; ++i) converted[i] = widen(x[i]);
    for (; i < padded; ++i) converted[i] = -Real(INFINITY);
    return converted;
  }
  const Real* effective_row(const Real* z, Real* converted) const {
    if constexpr (!kSigmoid) return z;
    for (int64_t i = 0; i < padded; i += kLanes) V::store(converted + i, log_sigmoid_of_vector<V>(V::load(z + i)));
    return converted;
  }
  Real largest(const Real* values) const {
    Register max = V::set(-Real(INFINITY));
    for (int64_t i = 0; i < padded; i += kLanes) max = V::max(max, V::load(values + i));
    return V::largest(max);
  }
  // R of weights that were summed with their maximum, which is 1
  Real rest_of(const Real* row_weights, Real total) const {
    Real rest = total - 1;
    if (rest < kSureRest<Real>) {
      const Register one = V::set(Real(1));
      Register sum = V::set(Real(0));
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Register e = V::load(row_weights + i);
        sum = V::add(sum, V::keep(V::not_equal(e, one), e));
      }
      rest = V::total(sum);
    }
    return rest;
  }

  // kEntropy: B too. Inlined, so that the constants of exponential() stay in registers from row to row.
  template <bool kEntropy>
  __attribute__((always_inline)) RouterRow<Real> measure_row(const Real* y, Real* row_weights) const {
    const Real max = largest(y);
    const Register reference = V::set(max), lowest = V::set(lowest_u<Real>());
    Register total = V::set(Real(0)), weighted = total;
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Register u = V::sub(V::load(y + i), reference), e = exponential(u);
      V::prefetch(y + i + kPrefetched);
      V::store(row_weights + i, e);
      total = V::add(total, e);
      if constexpr (kEntropy) weighted = V::fma(e, V::max(lowest, u), weighted);
    }
    return {max, rest_of(row_weights, V::total(total)), kEntropy ? V::total(weighted) : Real(0)};
  }

  // The k best of `scores`, which it destroys: those taken become -inf. False where there is nothing else left.
  bool choose_from_scores(uint8_t* bits) const {
    // locals: a byte that is written may be anything of *this to the compiler
    Real* const scores = this->scores;
    int32_t* const chosen = this->chosen;
    const int64_t padded = this->padded, k = arguments.k;
    Real numbers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = Real(lane);
    const Register lanes = V::load(numbers), nothing = V::set(-Real(INFINITY));
    Register taken = V::set(Real(-1));
    for (int64_t slot = 0; slot < k; ++slot) {
      Register best = nothing;
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Register place = V::add(lanes, V::set(Real(i)));
        const Register score = V::select(V::not_equal(place, taken), V::load(scores + i), nothing);
        V::store(scores + i, score);
        best = V::max(best, score);
      }
      const Real wanted = V::largest(best);
      if (!(wanted > -Real(INFINITY))) return false;
      Register minus_first = nothing;
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Register minus_place = V::sub(V::set(Real(-i)), lanes);
        const auto differs = V::not_equal(V::load(scores + i), V::set(wanted));
        minus_first = V::max(minus_first, V::select(differs, nothing, minus_place));
      }
      const Real first = -V::largest(minus_first);
      chosen[slot] = int32_t(first);
      set_chosen(bits, uint64_t(int32_t(first)));
      taken = V::set(first);
    }
    return true;
  }
  // by the logits, or by the scores plus expert_bias: softmax probabilities, or sigmoids before they are normalised
  void choose_of_row(const Real* z, const Real* row_weights, const RouterRow<Real>& row, uint8_t* bits) const {
    const Real* bias = static_cast<const Real*>(arguments.expert_bias);
    if (bias) bias += block.layer * n_experts;
    const Real scale = kSigmoid ? exp_of(row.max) : 1 / (1 + row.rest);
    const auto score_of = [&](int64_t e) { return bias ? row_weights[e] * scale + bias[e] : z[e]; };
    for (int64_t i = 0; i < padded; i += kLanes) V::store(scores + i, V::load(z + i));
    for (int64_t e = 0; bias && e < n_experts; ++e) scores[e] = score_of(e);
    if (row.rest == row.rest && choose_from_scores(bits)) return;
    choose<Real>(n_experts, arguments.k, score_of, chosen);
    for (int64_t byte = 0; byte < bytes_of_choice(n_experts); ++byte) bits[byte] = 0;
    for (int64_t slot = 0; slot < arguments.k; ++slot) set_chosen(bits, uint64_t(chosen[slot]));
  }
};

}  // namespace AVA_ISA
}  // namespace ava
