// Measures and differentiates a block of a router's rows. Included once by each router_rows_<isa>.cpp, which defines
// AVA_ISA and brings VectorFloat. The formulas are in router_rows.h.
#pragma once
#include "router_rows_measure.h"

namespace ava {
inline namespace AVA_ISA {

template <class Vector, class Element, bool kSigmoid>
struct RouterKernel : RouterReader<Vector, Element, kSigmoid> {
  using Reader = RouterReader<Vector, Element, kSigmoid>;
  using V = Vector;
  using Real = typename Vector::Value;
  using Register = typename Vector::Register;
  using Reader::arguments, Reader::block, Reader::n_experts, Reader::padded, Reader::row_at, Reader::counts;
  using Reader::choice_at, Reader::row_of, Reader::load_row, Reader::effective_row, Reader::choose_of_row;
  using Reader::chosen, Reader::weights, Reader::logits, Reader::effective, Reader::probability, Reader::importance;
  using Reader::kLanes, Reader::kBatch, Reader::Reader;

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
      if (counts(row)) chunk.rows[chunk.n++] = row;
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
        const RouterRow<Real> of_logits = this->template measure_row<false>(z[r], row_weights);
        chunk.max_logit[first + r] = of_logits.max, chunk.rest_of_logits[first + r] = of_logits.rest;
      }
      rows[r] = this->template measure_row<true>(effective_row(z[r], effective), row_weights);
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
      if (arguments.new_choice) {
        choose_of_row(z[r], row_weights, rows[r], arguments.new_choice + first_byte_of_choice(row));
        add_choices(chosen, row, row_weights, inverse[r], sums);
      } else if (arguments.wide_indices) {
        add_choices(arguments.wide_indices + at, row, row_weights, inverse[r], sums);
      } else {
        add_choices(arguments.indices + at, row, row_weights, inverse[r], sums);
      }
    }
  }

  int64_t first_byte_of_choice(int64_t row) const {
    return (block.layer * arguments.n_rows + row) * bytes_of_choice(n_experts);
  }
  // Own choices to `chosen`, in order; returns how many there are.
  int64_t read_choice(int64_t row) const {
    const uint8_t* const bytes = arguments.choice + first_byte_of_choice(row);
    const int64_t n_bytes = bytes_of_choice(n_experts);
    int64_t n = 0;
    for (int64_t first = 0; first < n_bytes; first += 8) {
      uint64_t bits = 0;
      if (first + 8 <= n_bytes)
        __builtin_memcpy(&bits, bytes + first, 8);
      else
        for (int64_t byte = first; byte < n_bytes; ++byte) bits |= uint64_t(bytes[byte]) << 8 * (byte - first);
      for (; bits != 0; bits &= bits - 1) chosen[n++] = int32_t(8 * first + __builtin_ctzll(bits));
    }
    return n;
  }
  template <class Index>
  void add_choices(const Index* experts, int64_t row, const Real* row_weights, Real inverse, RouterSums& sums) const {
    int64_t* const n_choices = sums.counts;
    for (int64_t slot = 0, k = arguments.k, n = n_experts; slot < k; ++slot) {
      const int64_t e = experts[slot];
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
      const int64_t n_own = of_importance && arguments.choice ? read_choice(row) : 0;
      const auto for_choices = [&](auto change) {
        for (int64_t i = 0; i < n_own; ++i) change(chosen[i]);
        for (int64_t slot = 0; of_importance && slot < arguments.k; ++slot) {  // k is 0 where none are given
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
    if constexpr (kSigmoid) of_logits = this->template measure_row<false>(z, logit_weights);
    const RouterRow<Real> row = this->template measure_row<kEntropy>(y, weights);
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

// use(the kernel for logits and scores of this kind)
template <class Vector, class Element, class Use>
static void with_kernel_of_type(const RouterRowsArguments& arguments, const RouterBlock& block, void* scratch,
                                const Use& use) {
  if (arguments.is_sigmoid)
    use(RouterKernel<Vector, Element, true>(arguments, block, scratch));
  else
    use(RouterKernel<Vector, Element, false>(arguments, block, scratch));
}
template <class Use>
static void with_kernel(const RouterRowsArguments& arguments, const RouterBlock& block, void* scratch, const Use& use) {
  switch (arguments.element_type) {
    case ElementType::f32: return with_kernel_of_type<VectorFloat, float>(arguments, block, scratch, use);
    case ElementType::bf16: return with_kernel_of_type<VectorFloat, BFloat16>(arguments, block, scratch, use);
    case ElementType::f16: return with_kernel_of_type<VectorFloat, Float16>(arguments, block, scratch, use);
    case ElementType::f64: return with_kernel_of_type<VectorDouble, double>(arguments, block, scratch, use);
  }
}

static void measure_router(const RouterRowsArguments& arguments, const RouterBlock& block, RouterSums& sums,
                           void* scratch) {
  with_kernel(arguments, block, scratch, [&](const auto& kernel) { kernel.measure(sums); });
}
static void differentiate_router(const RouterRowsArguments& arguments, const RouterBlock& block, void* scratch) {
  with_kernel(arguments, block, scratch, [](const auto& kernel) { kernel.differentiate(); });
}

constexpr RouterRowsKernels kRouterRowsKernels = {measure_router, differentiate_router};

}  // namespace AVA_ISA
}  // namespace ava
