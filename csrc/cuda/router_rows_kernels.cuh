// The kernels over a router's rows in registers: sums of a slot, and the gradient. One row is in router_rows_lanes.cuh.
#pragma once
#include "router_rows_lanes.cuh"

namespace ava {

// Blocks that a multiprocessor has registers for.
template <int kItems>
constexpr int kResidentBlocks = kItems == 8 ? 2 : 1;

// Sums of a slot: each lane over its rows and the warp over its lanes in float, the block in double.
template <class Element, int kItems, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, kResidentBlocks<kItems>)
    router_statistics_kernel(const RouterArguments<float> arguments, const int n_lanes) {
  AVA_DYNAMIC_SHARED(shared);
  const RouterLanes<Element, kItems, kSigmoid> lanes(arguments, n_lanes);
  if (!lanes.has_rows()) return;
  float probability[kItems] = {}, importance[kItems] = {}, lse_squared = 0, entropies = 0;
  int choices[kItems] = {}, n_counted = 0;
  lanes.for_rows([&](int64_t row, bool counts, const float* z) {
    float weights[kItems], lse = 0;
    if constexpr (kSigmoid) {
      const RouterRow<float> of_logits = lanes.template measure<false>(z, weights);
      lse = of_logits.max + log1p_of_rest(of_logits.rest);
    }
    float y[kItems];
    lanes.effective(z, y);
    const RouterRow<float> measured = lanes.template measure<true>(y, weights);
    if constexpr (!kSigmoid) lse = measured.max + log1p_of_rest(measured.rest);
    const float inverse = 1 / (1 + measured.rest);
    unsigned chosen = 0;
    if (arguments.choice && !arguments.expert_bias) {
      chosen = lanes.choose(row, counts, z);
    } else if (arguments.choice) {
      // by p, or by sigmoids before they are normalised
      const float scale = kSigmoid ? exp_of(measured.max) : inverse;
      const float* const bias = arguments.expert_bias + lanes.layer() * arguments.n_experts;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int expert = lanes.expert_at(i);
        y[i] = expert < arguments.n_experts ? weights[i] * scale + bias[expert] : -INFINITY;
      }
      chosen = lanes.choose(row, counts, y);
    }
    if (!counts) return;
    const auto add_choice = [&](int i) {
      importance[i] += weights[i] * inverse;
      ++choices[i];
    };
    if (!arguments.choice) lanes.template for_choices<true>(row, add_choice);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      probability[i] = fmaf(weights[i], inverse, probability[i]);
      if (chosen >> i & 1) add_choice(i);
    }
    if (lanes.lane() == 0) {
      lse_squared += lse * lse;
      entropies += entropy(measured);
      ++n_counted;
    }
  });

  if (!lanes.is_in_group()) return;
  // over the rows of the warp: lanes that hold the same experts
  for (int offset = n_lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      probability[i] += __shfl_xor_sync(kWholeWarp, probability[i], offset);
      importance[i] += __shfl_xor_sync(kWholeWarp, importance[i], offset);
      choices[i] += __shfl_xor_sync(kWholeWarp, choices[i], offset);
    }
    lse_squared += __shfl_xor_sync(kWholeWarp, lse_squared, offset);
    entropies += __shfl_xor_sync(kWholeWarp, entropies, offset);
    n_counted += __shfl_xor_sync(kWholeWarp, n_counted, offset);
  }
  const int n_experts = int(arguments.n_experts), n_reals = 2 * n_experts + 2, n_integers = n_experts + 1;
  float* const sums = reinterpret_cast<float*>(shared);                       // [kRouterWarps, n_reals]
  int* const counts = reinterpret_cast<int*>(sums + kRouterWarps * n_reals);  // [kRouterWarps, n_integers]
  const int warp = int(threadIdx.x) / 32;
  if (int(threadIdx.x) % 32 < n_lanes) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = lanes.expert_at(i);
      if (expert >= n_experts) continue;
      sums[warp * n_reals + expert] = probability[i];
      sums[warp * n_reals + n_experts + expert] = importance[i];
      counts[warp * n_integers + expert] = choices[i];
    }
    if (lanes.lane() == 0) {
      sums[warp * n_reals + 2 * n_experts] = lse_squared;
      sums[warp * n_reals + 2 * n_experts + 1] = entropies;
      counts[warp * n_integers + n_experts] = n_counted;
    }
  }
  __syncthreads();
  const int64_t slot = lanes.layer() * arguments.n_slots + blockIdx.x;
  for (int column = int(threadIdx.x); column < n_reals; column += kRouterThreads) {
    double sum = 0;
#pragma unroll
    for (int other = 0; other < kRouterWarps; ++other) sum += double(sums[other * n_reals + column]);
    arguments.sums[slot * n_reals + column] = float(sum);
  }
  for (int column = int(threadIdx.x); column < n_integers; column += kRouterThreads) {
    int sum = 0;
#pragma unroll
    for (int other = 0; other < kRouterWarps; ++other) sum += counts[other * n_integers + column];
    arguments.counts[slot * n_integers + column] = sum;
  }
}

// (1) of router_rows.h, with v of the group in registers.
template <class Element, int kItems, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, kResidentBlocks<kItems>)
    router_gradient_kernel(const RouterArguments<float> arguments, const int n_lanes) {
  using Lanes = RouterLanes<Element, kItems, kSigmoid>;
  const Lanes lanes(arguments, n_lanes);
  if (!lanes.has_rows()) return;
  const bool is_in_group = lanes.is_in_group();
  const int64_t group = lanes.group();
  const int n_experts = int(arguments.n_experts);
  const auto of_group = [&](const float* scalars) { return is_in_group && scalars ? scalars[group] : 0.f; };
  const float grad_lse_squared = of_group(arguments.grad_lse_squared), grad_entropy = of_group(arguments.grad_entropy);
  float common[kItems], of_importance[kItems], mean_of_group = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int expert = lanes.expert_at(i);
    const bool is_there = is_in_group && expert < n_experts;
    const int64_t at = group * n_experts + expert;
    common[i] = is_there && arguments.grad_probability ? arguments.grad_probability[at] : 0.f;
    of_importance[i] = is_there && arguments.grad_importance ? arguments.grad_importance[at] : 0.f;
    mean_of_group += common[i];
  }
  mean_of_group = lanes.sum_of_lanes(mean_of_group) / float(n_experts);
#pragma unroll
  for (int i = 0; i < kItems; ++i) common[i] -= mean_of_group;

  lanes.for_rows([&](int64_t row, bool counts, const float* z) {
    float weights[kItems], y[kItems], logit_weights[kSigmoid ? kItems : 1];
    RouterRow<float> of_logits{};
    if constexpr (kSigmoid) of_logits = lanes.template measure<false>(z, logit_weights);
    lanes.effective(z, y);
    const RouterRow<float> measured = lanes.template measure<true>(y, weights);
    if constexpr (!kSigmoid) of_logits = measured;

    float v[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) v[i] = common[i];
    if (arguments.grad_importance && counts)
      lanes.template for_choices<false>(row, [&](int i) { v[i] += of_importance[i]; });
    const bool is_sure = measured.rest < kSureRest<float>;
    float w = 0;
    if (__any_sync(kWholeWarp, is_sure)) {
      float of_largest = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) of_largest += weights[i] == 1 ? v[i] : 0.f;
      of_largest = lanes.sum_of_lanes(of_largest);
      w = is_sure ? of_largest : 0.f;
    }
    float mean = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) mean = fmaf(weights[i], v[i] - w, mean);
    mean = lanes.sum_of_lanes(mean);
    if (row < 0) return;

    const float inverse = 1 / (1 + measured.rest);
    const float of_lse = 2 * grad_lse_squared * (of_logits.max + log1p_of_rest(of_logits.rest));
    // what is added to (v - w) - eta u
    const float constant = grad_entropy * measured.weighted * inverse - mean * inverse + (kSigmoid ? 0.f : of_lse);
    const float of_softmax = of_lse / (1 + of_logits.rest);
    float gradient[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float u = Lanes::bounded_u(y[i], measured.max);
      gradient[i] = weights[i] * inverse * fmaf(-grad_entropy, u, (v[i] - w) + constant);
      if constexpr (kSigmoid) gradient[i] = fmaf(logit_weights[i], of_softmax, gradient[i] * log_sigmoid_slope(z[i]));
      if (!counts) gradient[i] = 0;
    }
    Element* const out =
        static_cast<Element*>(arguments.grad_logits) + (lanes.layer() * arguments.n_rows + row) * int64_t(n_experts);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll
    for (int vector = 0; vector < Lanes::kVectors; ++vector) {
      const int first = lanes.expert_at(vector * Lanes::kSize);
      if (aligned && first + Lanes::kSize <= n_experts) {
        store16(out + first, pack<Element>(gradient + vector * Lanes::kSize));
      } else {
#pragma unroll
        for (int i = 0; i < Lanes::kSize; ++i)
          if (first + i < n_experts) out[first + i] = from_float<Element>(gradient[vector * Lanes::kSize + i]);
      }
    }
  });
}

template <class Element, int kItems, bool kSigmoid>
void run_router_lanes_of(bool is_gradient, const RouterArguments<float>& arguments, int64_t n_layers, Stream stream) {
  const int n_lanes = lanes_of_row(arguments.n_experts);
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_slots), unsigned(n_layers));
  shape.block = dim3(kRouterThreads);
  if (is_gradient)
    return launch("router_gradient", router_gradient_kernel<Element, kItems, kSigmoid>, shape, stream, arguments,
                  n_lanes);
  shape.shared_bytes = kRouterWarps * (3 * size_t(arguments.n_experts) + 3) * sizeof(float);
  launch("router_statistics", router_statistics_kernel<Element, kItems, kSigmoid>, shape, stream, arguments, n_lanes);
}

template <class Element, bool kSigmoid>
void run_router_lanes(bool is_gradient, const RouterArguments<float>& arguments, int64_t n_layers, Stream stream) {
  if (items_of_lane(arguments.n_experts) == 8)
    run_router_lanes_of<Element, 8, kSigmoid>(is_gradient, arguments, n_layers, stream);
  else
    run_router_lanes_of<Element, 16, kSigmoid>(is_gradient, arguments, n_layers, stream);
}

}  // namespace ava
