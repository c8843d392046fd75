// The kernel of the gradient of rows. One row is in router_rows_lanes.cuh.
#pragma once
#include "router_rows_lanes.cuh"

namespace ava {

// log(1 + rest), as log1p_of_rest, with fast divisions.
__device__ __forceinline__ float fast_log1p_of_rest(float rest) {
  const float total = 1.f + rest;
  const uint32_t shifted = float_to_bits(total) - 0x3f3504f3u;  // sqrt(1/2)
  const float exponent = float(int32_t(shifted) >> 23), m = bits_to_float((shifted & 0x7fffffu) + 0x3f3504f3u);
  const float s = (m - 1.f) * reciprocal_fast(m + 1.f), square = s * s;
  const float series = (((square * (1.f / 9) + 1.f / 7) * square + 1.f / 5) * square + 1.f / 3) * square;
  const float lost = (rest - (total - 1.f)) * reciprocal_fast(total);
  return exponent * kLn2 + ((2.f * s) * series + (2.f * s)) + lost;
}

// (1) of router_rows.h, with v of the group in registers.
template <class Element, int kItems, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, kRouterBlocks)
    router_gradient_kernel(const RouterArguments<float> arguments, const int n_lanes) {
  using Lanes = RouterLanes<Element, kItems, kSigmoid>;
  AVA_DYNAMIC_SHARED(shared);
  const Lanes lanes(arguments, n_lanes, shared);
  if (!lanes.has_rows()) return;
  const bool is_in_group = lanes.is_in_group();
  const int64_t group = lanes.group();
  const int n_experts = int(arguments.n_experts);
  const auto of_group = [&](const float* scalars) { return is_in_group && scalars ? scalars[group] : 0.f; };
  const float grad_lse_squared = of_group(arguments.grad_lse_squared), grad_entropy = of_group(arguments.grad_entropy);
  const auto of_expert = [&](const float* vectors, int i) {
    const int expert = lanes.expert_at(i);
    return is_in_group && expert < n_experts && vectors ? vectors[group * n_experts + expert] : 0.f;
  };
  // Of this lane's experts, four by four, in shared memory, which spares registers: v of the group without what is of a
  // row's choices, and what each choice adds.
  AVA_SHARED(uint4, common, 32 * kItems / 4);
  AVA_SHARED(uint4, of_choices, 32 * kItems / 4);
  const int own = lanes.lanes().own;
  float mean_of_group = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) mean_of_group += of_expert(arguments.grad_probability, i);
  mean_of_group = lanes.lanes().sum(mean_of_group) / float(n_experts);
  if (int(threadIdx.x) < n_lanes) {
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
      float four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = of_expert(arguments.grad_probability, i + j) - mean_of_group;
      common[i / 4 * 32 + own] = pack<float>(four);
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = of_expert(arguments.grad_importance, i + j);
      of_choices[i / 4 * 32 + own] = pack<float>(four);
    }
  }
  __syncthreads();

  // of a row: with what its choices add
  const auto read_upstream = [&](const typename Lanes::Turn& turn, float* v) {
#pragma unroll
    for (int i = 0; i < kItems; i += 4) unpack<float>(common[i / 4 * 32 + own], v + i);
    if (!arguments.grad_importance) return;
    const auto add = [&](const ChosenItems& chosen) {
      float more[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i += 4) unpack<float>(of_choices[i / 4 * 32 + own], more + i);
      chosen.template for_each<kItems>([&](int i) { v[i] += more[i]; });
    };
    if (arguments.choice)
      add(lanes.load_choice(turn));
    else
      lanes.for_given(turn, add);
  };
  // An ordinary row's; false where this lane's part says that the row is another one.
  const auto differentiate_ordinary = [&](const typename Lanes::Turn& turn, float* gradient) {
    float v[kItems], weights[kItems], z[kItems];
    read_upstream(turn, v);
    const float largest = lanes.exponentiate(turn, z, weights);
    // (v_j - eta z_j) without its mean over p is both v_j and u_j without theirs
    float total = 0, mean = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      v[i] = fmaf(-grad_entropy, z[i], v[i]);
      total += weights[i];
      mean = fmaf(weights[i], v[i], mean);
    }
    lanes.lanes().sum(total, mean);
    const float log_total = log2_fast(total);
    const float inverse = turn.counts() ? reciprocal_fast(total) : 0.f;
    const float of_row = inverse * fmaf(-mean, inverse, 2 * kLn2 * grad_lse_squared * log_total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) gradient[i] = weights[i] * fmaf(v[i], inverse, of_row);
    return lanes.is_ordinary(total, log_total, mean, largest);
  };
  const auto differentiate = [&](const typename Lanes::Turn& turn, float* gradient) {
    float v[kItems], weights[kItems], u[kItems];
    RouterRow<float> of_logits{};
    if constexpr (kSigmoid) {
      lanes.read(turn, u);
      of_logits = lanes.template measure<false>(u, weights);
    }
    lanes.read_effective(turn, u);
    const RouterRow<float> measured = lanes.template measure<true>(u, weights);
    if constexpr (!kSigmoid) of_logits = measured;
    read_upstream(turn, v);
    const bool is_sure = measured.rest < kSureRest<float>;
    if (__any_sync(kWholeWarp, is_sure)) {
      float of_largest = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) of_largest += weights[i] == 1 ? v[i] : 0.f;
      of_largest = lanes.lanes().sum(of_largest);
      const float w = is_sure ? of_largest : 0.f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) v[i] -= w;
    }
    float mean = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) mean = fmaf(weights[i], v[i], mean);
    mean = lanes.lanes().sum(mean);

    const float inverse = reciprocal_fast(1 + measured.rest);
    const float of_lse = 2 * grad_lse_squared * (of_logits.max + fast_log1p_of_rest(of_logits.rest));
    // what is added to ((v - w) - eta u) / (1 + R)
    const float constant =
        inverse * (grad_entropy * measured.weighted * inverse - mean * inverse + (kSigmoid ? 0.f : of_lse));
    const float of_u = -grad_entropy * inverse;
    const float of_softmax = kSigmoid ? of_lse * reciprocal_fast(1 + of_logits.rest) : 0.f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) gradient[i] = weights[i] * fmaf(v[i], inverse, fmaf(of_u, u[i], constant));
    if constexpr (kSigmoid) {
      lanes.read(turn, u);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float of_logit = lanes.exponential(lanes.bounded_u(u[i], of_logits.max));
        gradient[i] = fmaf(of_logit, of_softmax, gradient[i] * log_sigmoid_slope(u[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (!turn.counts()) gradient[i] = 0;
  };

  Element* const grad_logits =
      Lanes::kept(static_cast<Element*>(arguments.grad_logits) + lanes.row_of_all(0) * n_experts + lanes.expert_at(0));
  // whole vectors at multiples of 16 bytes
  const bool is_regular = Lanes::kept(n_experts % Lanes::kSize == 0 && lanes.expert_at(kItems - 1) < n_experts &&
                                      reinterpret_cast<uintptr_t>(grad_logits) % 16 == 0);
  const auto store = [&](const typename Lanes::Turn& turn, const float* gradient) {
    if (!turn.has_row()) return;
    Element* const out = grad_logits + uint64_t(turn.row()) * unsigned(n_experts);
    if (is_regular) {
#pragma unroll
      for (int vector = 0; vector < Lanes::kVectors; ++vector)
        store16(out + unsigned(vector * n_lanes * Lanes::kSize), pack<Element>(gradient + vector * Lanes::kSize));
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (lanes.expert_at(i) < n_experts)
          out[lanes.expert_at(i) - lanes.expert_at(0)] = from_float<Element>(gradient[i]);
    }
  };
  lanes.for_rows([&](const typename Lanes::Turn& turn) {
    float gradient[kItems];
    if constexpr (Lanes::kQuick) {
      const bool is_ordinary = differentiate_ordinary(turn, gradient);
      if (!__any_sync(kWholeWarp, !is_ordinary)) return store(turn, gradient);
      // The warp comes along, but what a row gets does not depend on the others.
      const bool is_stored = lanes.lanes().all(is_ordinary);
      if (is_stored) store(turn, gradient);
      differentiate(turn, gradient);
      if (is_stored) return;
    } else {
      differentiate(turn, gradient);
    }
    store(turn, gradient);
  });
}

}  // namespace ava
