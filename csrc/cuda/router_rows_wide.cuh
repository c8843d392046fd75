// A router's rows of float64, or of more experts than registers hold: a warp to a row, which is read again for every
// pass over it. Simple and right, not fast.
#pragma once
#include "router_rows_arguments.cuh"

namespace ava {

// The best of the experts that were offered.
template <class Real>
struct BestExpert {
  Real score = Real(-INFINITY);
  int32_t expert = 0x7fffffff;

  __device__ void offer(Real other_score, int32_t other) {
    if (ranks_before(other_score, other, score, expert)) score = other_score, expert = other;
  }
  // of the warp, in every lane
  __device__ void merge_lanes() {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Real other_score = __shfl_xor_sync(kWholeWarp, score, offset);
      const int32_t other = __shfl_xor_sync(kWholeWarp, expert, offset);
      offer(other_score, other);
    }
  }
};

// One row, as the lanes of a warp see it.
template <class Element, bool kSigmoid>
class WideRouter {
 public:
  using Real = RealOf<Element>;

  __device__ WideRouter(const RouterArguments<Real>& arguments, int64_t layer, int64_t row)
      : a_(arguments),
        layer_(layer),
        row_(row),
        lane_(int(threadIdx.x) % 32),
        logits_(static_cast<const Element*>(arguments.logits[layer - arguments.first_layer]) +
                row_offset(arguments.layout, row)) {}

  __device__ Real logit(int64_t expert) const { return to_real(logits_[expert]); }
  __device__ Real effective(int64_t expert) const { return kSigmoid ? log_sigmoid(logit(expert)) : logit(expert); }

  __device__ WideRouterRow<Real> measure() const {
    const RouterRow<Real> row = measure_of([&](int64_t expert) { return effective(expert); });
    RouterRow<Real> of_logits = row;
    if constexpr (kSigmoid) of_logits = measure_of([&](int64_t expert) { return logit(expert); });
    return {row, of_logits.max, of_logits.rest};
  }

  // The k best, by rank: each is the best of those behind the one before. None where the row does not count.
  __device__ void choose(const WideRouterRow<Real>& measured, bool counts) const {
    const int64_t n_bytes = bytes_of_choice(a_.n_experts);
    uint8_t* const choice = a_.new_choice + (layer_ * a_.n_rows + row_) * n_bytes;
    for (int64_t byte = lane_; byte < n_bytes; byte += 32) choice[byte] = 0;
    __syncwarp();
    const Real* const bias = a_.expert_bias ? a_.expert_bias + layer_ * a_.n_experts : nullptr;
    const Real scale = kSigmoid ? exp_of(measured.row.max) : 1 / (1 + measured.row.rest);
    BestExpert<Real> before;
    for (int64_t slot = 0; counts && slot < a_.k; ++slot) {
      BestExpert<Real> best;
      for (int64_t expert = lane_; expert < a_.n_experts; expert += 32) {
        const Real score = bias ? exp_of(effective(expert) - measured.row.max) * scale + bias[expert] : logit(expert);
        if (slot == 0 || ranks_before(before.score, before.expert, score, expert)) best.offer(score, int32_t(expert));
      }
      best.merge_lanes();
      if (lane_ == 0) set_chosen(choice, uint64_t(best.expert));
      before = best;
    }
  }

  __device__ int times_chosen(int64_t expert) const {
    const int64_t row_of_all = layer_ * a_.n_rows + row_;
    if (const uint8_t* const own = a_.new_choice ? a_.new_choice : a_.choice)
      return is_chosen(own + row_of_all * bytes_of_choice(a_.n_experts), uint64_t(expert));
    int times = 0;
    for (int64_t slot = 0; slot < a_.k; ++slot) {
      const int64_t chosen = a_.choice_at(layer_, row_, slot);
      AVA_DEVICE_CHECK(chosen >= 0 && chosen < a_.n_experts);
      times += chosen == expert;
    }
    return times;
  }
  // v of the group, with what the row chose
  __device__ Real upstream(int64_t group, int64_t expert, Real mean_of_group) const {
    Real v = a_.grad_probability ? a_.grad_probability[group * a_.n_experts + expert] - mean_of_group : Real(0);
    const int times = a_.grad_importance ? times_chosen(expert) : 0;
    if (times > 0) v += Real(times) * a_.grad_importance[group * a_.n_experts + expert];
    return v;
  }
  __device__ void differentiate(int64_t group, Real mean_of_group) const {
    const WideRouterRow<Real> measured = measure();
    const RouterRow<Real>& row = measured.row;
    Real of_largest = 0;
    for (int64_t expert = lane_; expert < a_.n_experts; expert += 32)
      if (effective(expert) == row.max) of_largest += upstream(group, expert, mean_of_group);
    of_largest = warp_sum(of_largest);
    const Real w = row.rest < kSureRest<Real> ? of_largest : Real(0);
    Real mean = 0;
    for (int64_t expert = lane_; expert < a_.n_experts; expert += 32)
      mean += exp_of(effective(expert) - row.max) * (upstream(group, expert, mean_of_group) - w);
    mean = warp_sum(mean) / (1 + row.rest);
    const Real grad_lse_squared = a_.grad_lse_squared ? a_.grad_lse_squared[group] : Real(0);
    const Real grad_entropy = a_.grad_entropy ? a_.grad_entropy[group] : Real(0);
    const Real of_lse = 2 * grad_lse_squared * (measured.max_logit + log1p_of_rest(measured.rest_of_logits));
    for (int64_t expert = lane_; expert < a_.n_experts; expert += 32) {
      const Real u = effective(expert) - row.max, bounded = u > lowest_u<Real>() ? u : lowest_u<Real>();
      const Real centred = upstream(group, expert, mean_of_group) - w;
      Real gradient = effective_gradient(row, bounded, centred, mean, grad_entropy);
      if constexpr (kSigmoid) gradient *= log_sigmoid_slope(logit(expert));
      gradient += of_lse * exp_of(logit(expert) - measured.max_logit) / (1 + measured.rest_of_logits);
      store(expert, gradient);
    }
  }
  __device__ void store_zeros() const {
    for (int64_t expert = lane_; expert < a_.n_experts; expert += 32) store(expert, Real(0));
  }

 private:
  template <class ValueOf>
  __device__ RouterRow<Real> measure_of(ValueOf value_of) const {
    Real max = -Real(INFINITY);
    for (int64_t expert = lane_; expert < a_.n_experts; expert += 32)
      if (value_of(expert) > max) max = value_of(expert);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Real other = __shfl_xor_sync(kWholeWarp, max, offset);
      if (other > max) max = other;
    }
    Real rest = 0, n_largest = 0, weighted = 0;
    for (int64_t expert = lane_; expert < a_.n_experts; expert += 32) {
      const Real u = value_of(expert) - max, e = exp_of(u);
      (e == 1 ? n_largest : rest) += e;
      if (e != 0) weighted += u * e;
    }
    return {max, warp_sum(rest) + (warp_sum(n_largest) - 1), warp_sum(weighted)};
  }
  __device__ void store(int64_t expert, Real gradient) const {
    Element* const out = static_cast<Element*>(a_.grad_logits) + (layer_ * a_.n_rows + row_) * a_.n_experts;
    out[expert] = from_real<Element>(gradient);
  }

  const RouterArguments<Real>& a_;
  const int64_t layer_, row_;
  const int lane_;
  const Element* const logits_;
};

// A warp to a row, in the order of the slots.
template <class Element, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, 1)
    wide_router_rows_kernel(const RouterArguments<RealOf<Element>> arguments) {
  const int64_t layer = arguments.first_layer + blockIdx.y;
  const RouterSlot slot = arguments.rows_of_slot(blockIdx.x);
  for (int64_t place = slot.begin + threadIdx.x / 32; place < slot.end; place += kRouterWarps) {
    const int64_t row = arguments.row_at(place);
    const bool counts = slot.segment < arguments.n_segments && arguments.counts_row(layer, row);
    const WideRouter<Element, kSigmoid> router(arguments, layer, row);
    WideRouterRow<RealOf<Element>> measured{};
    if (counts) measured = router.measure();
    if (threadIdx.x % 32 == 0) arguments.wide_rows[layer * arguments.n_rows + row] = measured;
    if (arguments.new_choice) router.choose(measured, counts);
  }
}

// Sums of a slot, a thread to an expert; the first one of all also adds what is one number per row.
template <class Element, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, 1)
    wide_router_sums_kernel(const RouterArguments<RealOf<Element>> arguments) {
  using Real = RealOf<Element>;
  const int64_t layer = arguments.first_layer + blockIdx.y, n_experts = arguments.n_experts;
  const int64_t n_tiles = (n_experts + kRouterThreads - 1) / kRouterThreads, slot_index = blockIdx.x / n_tiles;
  const int64_t expert = blockIdx.x % n_tiles * kRouterThreads + threadIdx.x;
  const RouterSlot slot = arguments.rows_of_slot(slot_index);
  if (expert >= n_experts || slot.segment >= arguments.n_segments) return;
  double probability = 0, importance = 0, lse_squared = 0, entropies = 0;
  int32_t choices = 0, n_counted = 0;
  for (int64_t place = slot.begin; place < slot.end; ++place) {
    const int64_t row = arguments.row_at(place), at = layer * arguments.n_rows + row;
    if (!arguments.counts_row(layer, row)) continue;
    const WideRouterRow<Real> measured = arguments.wide_rows[at];
    const WideRouter<Element, kSigmoid> router(arguments, layer, row);
    const Real p = exp_of(router.effective(expert) - measured.row.max) / (1 + measured.row.rest);
    probability += double(p);
    const int times = router.times_chosen(expert);
    choices += times;
    if (times > 0) importance += times * double(p);  // 0 times nan is not 0
    if (expert != 0) continue;
    const Real lse = measured.max_logit + log1p_of_rest(measured.rest_of_logits);
    lse_squared += double(lse * lse);
    entropies += double(entropy(measured.row));
    ++n_counted;
  }
  const int64_t of_slot = layer * arguments.n_slots + slot_index;
  Real* const sums = arguments.sums + of_slot * (2 * n_experts + 2);
  int32_t* const counts = arguments.counts + of_slot * (n_experts + 1);
  sums[expert] = Real(probability);
  sums[n_experts + expert] = Real(importance);
  counts[expert] = choices;
  if (expert != 0) return;
  sums[2 * n_experts] = Real(lse_squared);
  sums[2 * n_experts + 1] = Real(entropies);
  counts[n_experts] = n_counted;
}

template <class Element, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, 1)
    wide_router_gradient_kernel(const RouterArguments<RealOf<Element>> arguments) {
  using Real = RealOf<Element>;
  const int64_t layer = arguments.first_layer + blockIdx.y;
  const RouterSlot slot = arguments.rows_of_slot(blockIdx.x);
  const bool is_in_group = slot.segment < arguments.n_segments;
  const int64_t group = layer * arguments.n_segments + slot.segment;
  Real mean_of_group = 0;
  if (is_in_group && arguments.grad_probability)
    for (int64_t expert = threadIdx.x % 32; expert < arguments.n_experts; expert += 32)
      mean_of_group += arguments.grad_probability[group * arguments.n_experts + expert];
  mean_of_group = warp_sum(mean_of_group) / Real(arguments.n_experts);
  for (int64_t place = slot.begin + threadIdx.x / 32; place < slot.end; place += kRouterWarps) {
    const int64_t row = arguments.row_at(place);
    const WideRouter<Element, kSigmoid> router(arguments, layer, row);
    if (is_in_group && arguments.counts_row(layer, row))
      router.differentiate(group, mean_of_group);
    else
      router.store_zeros();
  }
}

template <class Element, bool kSigmoid>
void run_router_wide(bool is_gradient, const RouterArguments<RealOf<Element>>& arguments, int64_t n_layers,
                     Stream stream) {
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_slots), unsigned(n_layers));
  shape.block = dim3(kRouterThreads);
  if (is_gradient)
    return launch("router_gradient", wide_router_gradient_kernel<Element, kSigmoid>, shape, stream, arguments);
  launch("router_statistics", wide_router_rows_kernel<Element, kSigmoid>, shape, stream, arguments);
  shape.grid.x *= unsigned((arguments.n_experts + kRouterThreads - 1) / kRouterThreads);
  launch("router_statistics", wide_router_sums_kernel<Element, kSigmoid>, shape, stream, arguments);
}

}  // namespace ava
