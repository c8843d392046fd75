// Measures and differentiates a block of a router's rows. Included once by each router_rows_<isa>.cpp, which defines
// AVA_ISA and brings VectorFloat. The formulas are in router_rows.h.
#pragma once
#include "../router_rows.h"
#include "router_rows_kernels.h"
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
struct RouterKernel {
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

  RouterKernel(const RouterRowsArguments& all, const RouterBlock& some, void* scratch)
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
  bool choose_from_scores(int32_t* chosen) const {
    Real numbers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = Real(lane);
    const Register lanes = V::load(numbers), nothing = V::set(-Real(INFINITY));
    Register taken = V::set(Real(-1));
    for (int64_t slot = 0; slot < arguments.k; ++slot) {
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
      taken = V::set(first);
    }
    return true;
  }
  // by the logits, or by the scores plus expert_bias: softmax probabilities, or sigmoids before they are normalised
  void choose_of_row(const Real* z, const Real* row_weights, const RouterRow<Real>& row, int32_t* chosen) const {
    const Real* bias = static_cast<const Real*>(arguments.expert_bias);
    if (bias) bias += block.layer * n_experts;
    const Real scale = kSigmoid ? exp_of(row.max) : 1 / (1 + row.rest);
    const auto score_of = [&](int64_t e) { return bias ? row_weights[e] * scale + bias[e] : z[e]; };
    for (int64_t i = 0; i < padded; i += kLanes) V::store(scores + i, V::load(z + i));
    for (int64_t e = 0; bias && e < n_experts; ++e) scores[e] = score_of(e);
    if (row.rest == row.rest && choose_from_scores(chosen)) return;
    choose<Real>(n_experts, arguments.k, score_of, chosen);
  }

  // What is kept of the rows that are added in float, for arithmetic on all of them at once.
  struct Chunk {
    int64_t n = 0;
    int64_t rows[kRowsInFloat];
    Real max[kRowsInFloat], rest[kRowsInFloat], weighted[kRowsInFloat];  // of y
    Real max_logit[kRowsInFloat], rest_of_logits[kRowsInFloat];          // of z, for sigmoid scores
  };

  void measure(RouterSums& sums) const {
    for (int64_t e = 0; e < 2 * n_experts; ++e) sums.vectors[e] = 0;
    for (int64_t e = 0; e <= n_experts; ++e) sums.counts[e] = 0;
    sums.scalars[0] = sums.scalars[1] = 0;
    sums.bad_row = -1;
    Chunk chunk;
    for (int64_t place = block.begin; place < block.end; ++place) {
      const int64_t row = row_at(place);
      if (counts(row))
        chunk.rows[chunk.n++] = row;
      else if (arguments.choice)
        for (int64_t slot = 0; slot < arguments.k; ++slot)
          arguments.choice[(block.layer * arguments.n_rows + row) * arguments.k + slot] = -1;
      if (chunk.n == kRowsInFloat || place + 1 == block.end) {
        add_chunk(chunk, sums);
        chunk.n = 0;
      }
    }
  }

  void add_chunk(Chunk& chunk, RouterSums& sums) const {
    for (int64_t e = 0; e < padded; ++e) probability[e] = importance[e] = 0;
    const int64_t n = chunk.n;
    int64_t first = 0;
    for (; first + kBatch <= n; first += kBatch) add_rows<kBatch>(chunk, first, sums);
    for (; first < n; ++first) add_rows<1>(chunk, first, sums);
    Real lse_squared[kRowsInFloat], entropies[kRowsInFloat];
    for (int64_t r = 0; r < n; ++r) {
      const Real log_total = log1p_of_rest(chunk.rest[r]);
      entropies[r] = log_total - chunk.weighted[r] / (1 + chunk.rest[r]);
      const Real lse =
          kSigmoid ? chunk.max_logit[r] + log1p_of_rest(chunk.rest_of_logits[r]) : chunk.max[r] + log_total;
      lse_squared[r] = lse * lse;
    }
    for (int64_t r = 0; r < n; ++r) sums.scalars[0] += lse_squared[r], sums.scalars[1] += entropies[r];
    for (int64_t e = 0; e < n_experts; ++e) sums.vectors[e] += probability[e];
    for (int64_t e = 0; e < n_experts; ++e) sums.vectors[n_experts + e] += importance[e];
    sums.counts[n_experts] += n;
  }

  template <int kRows>
  void add_rows(Chunk& chunk, int64_t first, RouterSums& sums) const {
    const Real* z[kRows];
    RouterRow<Real> rows[kRows];
    Real inverse[kRows];
    Register factor[kRows];
    for (int r = 0; r < kRows; ++r) {
      Real* const row_weights = weights + r * padded;
      z[r] = load_row(row_of(chunk.rows[first + r]), logits + r * padded);
      if constexpr (kSigmoid) {
        const RouterRow<Real> of_logits = measure_row<false>(z[r], row_weights);
        chunk.max_logit[first + r] = of_logits.max, chunk.rest_of_logits[first + r] = of_logits.rest;
      }
      rows[r] = measure_row<true>(effective_row(z[r], effective), row_weights);
      chunk.max[first + r] = rows[r].max, chunk.rest[first + r] = rows[r].rest;
      chunk.weighted[first + r] = rows[r].weighted;
      inverse[r] = 1 / (1 + rows[r].rest), factor[r] = V::set(inverse[r]);
    }
    for (int64_t i = 0; i < padded; i += kLanes) {
      Register sum = V::load(probability + i);
      for (int r = 0; r < kRows; ++r) sum = V::fma(V::load(weights + r * padded + i), factor[r], sum);
      V::store(probability + i, sum);
    }
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = chunk.rows[first + r], at = (block.layer * arguments.n_rows + row) * arguments.k;
      const Real* row_weights = weights + r * padded;
      if (arguments.choice) choose_of_row(z[r], row_weights, rows[r], arguments.choice + at);
      if (arguments.wide_indices)
        add_choices(arguments.wide_indices + at, row, row_weights, inverse[r], sums);
      else
        add_choices((arguments.choice ? arguments.choice : arguments.indices) + at, row, row_weights, inverse[r], sums);
    }
  }

  template <class Index>
  void add_choices(const Index* chosen, int64_t row, const Real* row_weights, Real inverse, RouterSums& sums) const {
    int64_t* const n_choices = sums.counts;
    for (int64_t slot = 0, k = arguments.k, n = n_experts; slot < k; ++slot) {
      const int64_t e = chosen[slot];
      if (e < 0 || e >= n) {
        if (sums.bad_row < 0 || row < sums.bad_row) sums.bad_row = row;
        continue;
      }
      ++n_choices[e];
      importance[e] += row_weights[e] * inverse;
    }
  }

  void differentiate() const {
    if (arguments.grad_entropy)
      differentiate_rows<true>();
    else
      differentiate_rows<false>();
  }

  template <bool kEntropy>
  void differentiate_rows() const {
    const auto of_group = [&](const void* scalars) {
      return scalars ? static_cast<const Real*>(scalars)[block.group] : Real(0);
    };
    const Real grad_lse_squared = of_group(arguments.grad_lse_squared), grad_entropy = of_group(arguments.grad_entropy);
    const Real* upstream = static_cast<const Real*>(arguments.grad_probability);
    const Real* of_importance = static_cast<const Real*>(arguments.grad_importance);
    if (of_importance) of_importance += block.group * n_experts;
    Real* const v = probability;
    Real* const common = importance;  // v without what a row chose
    double mean = 0;
    for (int64_t e = 0; upstream && e < n_experts; ++e) mean += upstream[block.group * n_experts + e];
    mean /= double(n_experts);
    for (int64_t e = 0; e < padded; ++e)
      v[e] = common[e] = upstream && e < n_experts ? upstream[block.group * n_experts + e] - Real(mean) : Real(0);
    for (int64_t place = block.begin; place < block.end; ++place) {
      const int64_t row = row_at(place);
      Element* out = static_cast<Element*>(arguments.grad_logits) + (block.layer * arguments.n_rows + row) * n_experts;
      if (!counts(row)) {
        for (int64_t e = 0; e < n_experts; ++e) narrow(Real(0), out + e);
        continue;
      }
      const auto for_choices = [&](auto change) {
        for (int64_t slot = 0; of_importance && slot < arguments.k; ++slot) {
          const int64_t e = choice_at(row, slot);
          if (e >= 0 && e < n_experts) change(e);
        }
      };
      for_choices([&](int64_t e) { v[e] += of_importance[e]; });
      differentiate_row<kEntropy>(row_of(row), out, v, grad_lse_squared, grad_entropy);
      for_choices([&](int64_t e) { v[e] = common[e]; });
    }
  }

  // sum of e (v - w)
  Real dot(const Real* row_weights, const Real* v, Real w) const {
    Register sum = V::set(Real(0));
    for (int64_t i = 0; i < padded; i += kLanes)
      sum = V::fma(V::load(row_weights + i), V::sub(V::load(v + i), V::set(w)), sum);
    return V::total(sum);
  }
  // v of the maximum
  Real value_at_maximum(const Real* row_weights, const Real* v) const {
    Register sum = V::set(Real(0));
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Register e = V::load(row_weights + i), value = V::load(v + i);
      sum = V::add(sum, V::sub(value, V::keep(V::not_equal(e, V::set(Real(1))), value)));
    }
    return V::total(sum);
  }

  template <bool kEntropy>
  void differentiate_row(const Element* x, Element* out, const Real* v, Real grad_lse_squared,
                         Real grad_entropy) const {
    const Real* z = load_row(x, logits);
    const Real* y = effective_row(z, effective);
    Real* const logit_weights = weights + padded;
    RouterRow<Real> of_logits{};
    if constexpr (kSigmoid) of_logits = measure_row<false>(z, logit_weights);
    const RouterRow<Real> row = measure_row<kEntropy>(y, weights);
    if constexpr (!kSigmoid) of_logits = row;
    const Real inverse = 1 / (1 + row.rest);
    const Real w = row.rest < kSureRest<Real> ? value_at_maximum(weights, v) : Real(0);
    const Real of_lse = 2 * grad_lse_squared * (of_logits.max + log1p_of_rest(of_logits.rest));
    // what is added to (v - w) - eta u
    const Real constant =
        grad_entropy * row.weighted * inverse - dot(weights, v, w) * inverse + (kSigmoid ? Real(0) : of_lse);
    const Register factor = V::set(inverse), shift = V::set(constant), centre = V::set(w), max = V::set(row.max),
                   lowest = V::set(lowest_u<Real>()), minus_entropy = V::set(-grad_entropy),
                   of_softmax = V::set(of_lse / (1 + of_logits.rest));
    const auto gradient = [&](int64_t i) {
      Register value = V::add(V::sub(V::load(v + i), centre), shift);
      if constexpr (kEntropy) value = V::fma(minus_entropy, V::max(lowest, V::sub(V::load(y + i), max)), value);
      value = V::mul(V::mul(V::load(weights + i), factor), value);
      if constexpr (kSigmoid) {
        value = V::mul(value, log_sigmoid_slope_of_vector<V>(V::load(z + i)));
        value = V::fma(V::load(logit_weights + i), of_softmax, value);
      }
      return value;
    };
    int64_t i = 0;
    for (; i + kLanes <= n_experts; i += kLanes) V::store(out + i, gradient(i));
    if (i < n_experts) {
      Real rest_of_row[kLanes];
      V::store(rest_of_row, gradient(i));
      for (int64_t lane = 0; i + lane < n_experts; ++lane) narrow(rest_of_row[lane], out + i + lane);
    }
  }
};

template <class Vector, class Element>
static void measure_block(const RouterRowsArguments& arguments, const RouterBlock& block, RouterSums& sums,
                          void* scratch) {
  if (arguments.is_sigmoid)
    RouterKernel<Vector, Element, true>(arguments, block, scratch).measure(sums);
  else
    RouterKernel<Vector, Element, false>(arguments, block, scratch).measure(sums);
}
static void measure_router(const RouterRowsArguments& arguments, const RouterBlock& block, RouterSums& sums,
                           void* scratch) {
  switch (arguments.element_type) {
    case ElementType::f32: return measure_block<VectorFloat, float>(arguments, block, sums, scratch);
    case ElementType::bf16: return measure_block<VectorFloat, BFloat16>(arguments, block, sums, scratch);
    case ElementType::f16: return measure_block<VectorFloat, Float16>(arguments, block, sums, scratch);
    case ElementType::f64: return measure_block<VectorDouble, double>(arguments, block, sums, scratch);
  }
}

template <class Vector, class Element>
static void differentiate_block(const RouterRowsArguments& arguments, const RouterBlock& block, void* scratch) {
  if (arguments.is_sigmoid)
    RouterKernel<Vector, Element, true>(arguments, block, scratch).differentiate();
  else
    RouterKernel<Vector, Element, false>(arguments, block, scratch).differentiate();
}
static void differentiate_router(const RouterRowsArguments& arguments, const RouterBlock& block, void* scratch) {
  switch (arguments.element_type) {
    case ElementType::f32: return differentiate_block<VectorFloat, float>(arguments, block, scratch);
    case ElementType::bf16: return differentiate_block<VectorFloat, BFloat16>(arguments, block, scratch);
    case ElementType::f16: return differentiate_block<VectorFloat, Float16>(arguments, block, scratch);
    case ElementType::f64: return differentiate_block<VectorDouble, double>(arguments, block, scratch);
  }
}

constexpr RouterRowsKernels kRouterRowsKernels = {measure_router, differentiate_router};

}  // namespace AVA_ISA
}  // namespace ava
