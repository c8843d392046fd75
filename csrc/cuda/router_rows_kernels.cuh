// The kernels over a router's rows in registers: sums of a slot, and the gradient. One row is in router_rows_lanes.cuh.
#pragma once
#include <algorithm>

#include "router_rows_lanes.cuh"

namespace ava {

// Blocks that a multiprocessor has registers for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kRouterBlocks = 1;  // two would spill there
#else
constexpr int kRouterBlocks = 2;
#endif

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

// What is one number for each row: lse^2, the entropy, rows. The rows of a few turns are kept, one by each lane, so that
// the lanes evaluate as many at once.
class RowScalars {
 public:
  float lse_squared = 0, entropies = 0;
  int n_counted = 0;

  __device__ void keep(const LaneGroup& lanes, int turn, bool counts, const RouterRow<float>& row,
                       const RouterRow<float>& of_logits) {
    const int keeper = turn & (lanes.n - 1);
    if (lanes.own == keeper && counts) row_ = row, of_logits_ = of_logits, is_kept_ = true;
    if (keeper == lanes.n - 1) evaluate();
  }
  __device__ void evaluate() {
    if (!is_kept_) return;
    const float lse = of_logits_.max + log1p_of_rest(of_logits_.rest);
    lse_squared += lse * lse;
    entropies += entropy(row_);
    ++n_counted;
    is_kept_ = false;
  }

 private:
  RouterRow<float> row_{}, of_logits_{};
  bool is_kept_ = false;
};

// Sums of a slot: each lane over its rows and the warp over its lanes in float, the block in double.
template <class Element, int kItems, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads, kRouterBlocks)
    router_statistics_kernel(const RouterArguments<float> arguments, const int n_lanes) {
  using Lanes = RouterLanes<Element, kItems, kSigmoid>;
  using ScoreKey = std::conditional_t<sizeof(Element) == 2, uint32_t, uint64_t>;
  AVA_DYNAMIC_SHARED(shared);
  const Lanes lanes(arguments, n_lanes, shared);
  if (!lanes.has_rows()) return;
  float probability[kItems] = {}, importance[kItems] = {};
  ChoiceCounts choices;
  RowScalars scalars;
  const bool chooses = arguments.choice != nullptr, is_biased = arguments.expert_bias != nullptr;
  const bool is_for_all_at_once = arguments.k >= kLeastBest && arguments.k <= kBest;
  lanes.for_rows([&](int turn, int row, bool counts) {
    float weights[kItems], y[kItems];
    ChosenItems chosen;
    if (chooses && !is_biased) {
      lanes.read(turn, y);
      if (sizeof(Element) == 2 && is_for_all_at_once)
        chosen = lanes.choose_best(row, counts, y);
      else
        chosen = lanes.template choose<ScoreKey>(row, counts, y);
    }
    RouterRow<float> of_logits{};
    if constexpr (kSigmoid) {
      lanes.read(turn, y);
      of_logits = lanes.template measure<false>(y, weights);
    }
    lanes.read_effective(turn, y);
    const RouterRow<float> measured = lanes.template measure<true>(y, weights);
    if constexpr (!kSigmoid) of_logits = measured;
    scalars.keep(lanes.lanes(), turn, counts, measured, of_logits);
    const float inverse = reciprocal_fast(1 + measured.rest);
    if (chooses && is_biased) {  // by p, or by sigmoids before they are normalised
      const float scale = kSigmoid ? exp_of(measured.max) : inverse;
      const float* const bias = arguments.expert_bias + lanes.layer() * arguments.n_experts;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int expert = lanes.expert_at(i);
        y[i] = expert < arguments.n_experts ? weights[i] * scale + bias[expert] : -INFINITY;
      }
      chosen = lanes.template choose<uint64_t>(row, counts, y);
    }
    const auto add_chosen = [&](const ChosenItems& some) {
      if (!counts) return;
      choices.add(some);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (some.has(i)) importance[i] = fmaf(weights[i], inverse, importance[i]);
    };
    if (chooses)
      add_chosen(chosen);
    else
      lanes.template for_given<true>(row, counts, add_chosen);
    if (!counts) return;
#pragma unroll
    for (int i = 0; i < kItems; ++i) probability[i] = fmaf(weights[i], inverse, probability[i]);
  });
  scalars.evaluate();
  float lse_squared = scalars.lse_squared, entropies = scalars.entropies;
  int n_counted = scalars.n_counted;

  if (!lanes.is_in_group()) return;
  int n_choices[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) n_choices[i] = choices.of(i);
  // over the rows of the warp: lanes that hold the same experts
#pragma unroll 1
  for (int offset = n_lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      probability[i] += __shfl_xor_sync(kWholeWarp, probability[i], offset);
      importance[i] += __shfl_xor_sync(kWholeWarp, importance[i], offset);
      n_choices[i] += __shfl_xor_sync(kWholeWarp, n_choices[i], offset);
    }
  }
  lse_squared = warp_sum(lse_squared);
  entropies = warp_sum(entropies);
  n_counted = warp_sum(n_counted);
  cp_async_wait<0>();
  __syncthreads();  // sums lie where the rows lay
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
      counts[warp * n_integers + expert] = n_choices[i];
    }
    if (int(threadIdx.x) % 32 == 0) {
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
  // v of the group, without what is of a row's choices: [expert], in shared memory, which spares registers
  AVA_SHARED(uint4, common, kMostExpertsOfLanes / 4);
  const auto of_expert = [&](const float* vectors, int i) {
    const int expert = lanes.expert_at(i);
    return is_in_group && expert < n_experts && vectors ? vectors[group * n_experts + expert] : 0.f;
  };
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
      common[lanes.expert_at(i) / 4] = pack<float>(four);
    }
  }
  __syncthreads();

  Element* const grad_logits = static_cast<Element*>(arguments.grad_logits) + lanes.row_of_all(0) * n_experts;
  lanes.for_rows([&](int turn, int row, bool counts) {
    float weights[kItems], u[kItems];
    RouterRow<float> of_logits{};
    if constexpr (kSigmoid) {
      lanes.read(turn, u);
      of_logits = lanes.template measure<false>(u, weights);
    }
    lanes.read_effective(turn, u);
    const RouterRow<float> measured = lanes.template measure<true>(u, weights);
    if constexpr (!kSigmoid) of_logits = measured;

    float v[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i += 4) unpack<float>(common[lanes.expert_at(i) / 4], v + i);
    if (arguments.grad_importance)
      lanes.template for_given<false>(row, counts, [&](const ChosenItems& chosen) {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
          if (chosen.has(i)) v[i] += of_expert(arguments.grad_importance, i);
      });
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
    if (row < 0) return;

    const float inverse = reciprocal_fast(1 + measured.rest);
    const float of_lse = 2 * grad_lse_squared * (of_logits.max + fast_log1p_of_rest(of_logits.rest));
    // what is added to ((v - w) - eta u) / (1 + R)
    const float constant =
        inverse * (grad_entropy * measured.weighted * inverse - mean * inverse + (kSigmoid ? 0.f : of_lse));
    const float of_u = -grad_entropy * inverse;
    const float of_softmax = kSigmoid ? of_lse * reciprocal_fast(1 + of_logits.rest) : 0.f;
    float gradient[kItems];
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
    Element* const out = grad_logits + int64_t(row) * n_experts;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll
    for (int vector = 0; vector < Lanes::kVectors; ++vector) {
      const int first = lanes.expert_at(vector * Lanes::kSize);
      const uint4 bits = pack<Element>(gradient + vector * Lanes::kSize);
      if (aligned && first + Lanes::kSize <= n_experts) {
        store16(out + first, counts ? bits : uint4{0, 0, 0, 0});
      } else {
#pragma unroll
        for (int i = 0; i < Lanes::kSize; ++i)
          if (first + i < n_experts)
            out[first + i] = from_float<Element>(counts ? gradient[vector * Lanes::kSize + i] : 0.f);
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
  shape.shared_bytes = router_row_bytes(arguments.n_experts, int(sizeof(Element)));
  if (is_gradient)
    return launch("router_gradient", router_gradient_kernel<Element, kItems, kSigmoid>, shape, stream, arguments,
                  n_lanes);
  shape.shared_bytes =
      std::max(shape.shared_bytes, kRouterWarps * (3 * size_t(arguments.n_experts) + 3) * sizeof(float));
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
