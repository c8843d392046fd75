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
  // An ordinary row that counts, of log2 sum e^z and of this lane's part of sum z p.
  __device__ void add_ordinary(const LaneGroup& lanes, float log_total, float weighted) {
    const float lse = lanes.own == 0 ? log_total * kLn2 : 0.f;  // once for the row
    lse_squared = fmaf(lse, lse, lse_squared);
    entropies += lse - weighted;
    if (lanes.own == 0) ++n_counted;
  }
  __device__ void evaluate() {
    if (is_kept_) add(row_, of_logits_);
    is_kept_ = false;
  }
  // One at once.
  __device__ void add(const RouterRow<float>& row, const RouterRow<float>& of_logits) {
    const float lse = of_logits.max + log1p_of_rest(of_logits.rest);
    lse_squared += lse * lse;
    entropies += entropy(row);
    ++n_counted;
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
  const bool is_biased = arguments.expert_bias != nullptr;
  enum { kGiven, kBestOnes, kOneByOne };
  const bool is_at_once = sizeof(Element) == 2 && !is_biased && arguments.k >= kLeastBest && arguments.k <= kBest;
  const int choice = computed_once(!arguments.choice ? kGiven : is_at_once ? kBestOnes : kOneByOne);
  bool every_expert_exists = true;
  const BestOfLanes best_of_lanes(lanes.lanes(), int(arguments.k));
  // Of ordinary rows: weights, and what they are multiplied by to be p. False where a row of the warp is not.
  const auto measure_ordinary = [&](const typename Lanes::Turn& turn, float* weights, float& inverse) {
    float z[kItems], total = 0, weighted = 0;
    const float largest = lanes.exponentiate(turn, z, weights);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      total += weights[i];
      weighted = fmaf(weights[i], z[i], weighted);
    }
    total = lanes.lanes().sum(total);
    const float log_total = log2_fast(total);
    if (__any_sync(kWholeWarp, !lanes.is_ordinary(total, log_total, weighted, largest))) return false;
    inverse = reciprocal_fast(total);
    if (turn.counts()) scalars.add_ordinary(lanes.lanes(), log_total, weighted * inverse);
    return true;
  };
  // Of any; `scale` makes a weight a score that a bias is added to: p, or a sigmoid before it is normalised.
  const auto measure = [&](const typename Lanes::Turn& turn, float* weights, float& inverse, float& scale) {
    float y[kItems];
    RouterRow<float> of_logits{};
    if constexpr (kSigmoid) {
      lanes.read(turn, y);
      of_logits = lanes.template measure<false>(y, weights);
    }
    lanes.read_effective(turn, y);
    const RouterRow<float> measured = lanes.template measure<true>(y, weights);
    if constexpr (!kSigmoid) of_logits = measured;
    if constexpr (!Lanes::kQuick)
      scalars.keep(lanes.lanes(), turn.number, turn.counts(), measured, of_logits);
    else if (turn.counts() && lanes.lanes().own == 0)
      scalars.add(measured, of_logits);
    inverse = reciprocal_fast(1 + measured.rest);
    scale = kSigmoid ? exp_of(measured.max) : inverse;
  };

  lanes.for_rows([&](const typename Lanes::Turn& turn) {
    float weights[kItems], inverse, scale;
    bool is_done = false;
    if constexpr (Lanes::kQuick) {
      is_done = measure_ordinary(turn, weights, inverse);
      scale = inverse;
    }
    if (!is_done) measure(turn, weights, inverse, scale);
    const float added = turn.counts() ? inverse : 0.f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) probability[i] = fmaf(weights[i], added, probability[i]);
    const auto add_chosen = [&](const ChosenItems& chosen) {
      if (!turn.counts()) return;
      choices.add(chosen);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (chosen.has(i)) importance[i] = fmaf(weights[i], inverse, importance[i]);
    };
    if (choice == kGiven) {
      every_expert_exists = lanes.for_given(turn, add_chosen) && every_expert_exists;
      return;
    }
    if constexpr (sizeof(Element) == 2) {
      if (choice == kBestOnes)
        return lanes.choose_best(turn, best_of_lanes, [&](int i) {
          importance[i] = fmaf(weights[i], inverse, importance[i]);
          choices.add(i);
        });
    }
    float scores[kItems];
    if (!is_biased) {
      lanes.read(turn, scores);
      return add_chosen(lanes.template choose<ScoreKey>(turn, scores));
    }
    const float* const bias = arguments.expert_bias + lanes.layer() * arguments.n_experts;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = lanes.expert_at(i);
      scores[i] = expert < arguments.n_experts ? weights[i] * scale + bias[expert] : -INFINITY;
    }
    add_chosen(lanes.template choose<uint64_t>(turn, scores));
  });
  AVA_DEVICE_CHECK(every_expert_exists);
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
    lanes.for_given(turn, [&](const ChosenItems& chosen) {
      float more[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i += 4) unpack<float>(of_choices[i / 4 * 32 + own], more + i);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (chosen.has(i)) v[i] += more[i];
    });
  };
  // An ordinary row's; false where a row of the warp is not.
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
    if (__any_sync(kWholeWarp, !lanes.is_ordinary(total, log_total, mean, largest))) return false;
    const float inverse = turn.counts() ? reciprocal_fast(total) : 0.f;
    const float of_row = inverse * fmaf(-mean, inverse, 2 * kLn2 * grad_lse_squared * log_total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) gradient[i] = weights[i] * fmaf(v[i], inverse, of_row);
    return true;
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
      computed_once(static_cast<Element*>(arguments.grad_logits) + lanes.row_of_all(0) * n_experts + lanes.expert_at(0));
  // whole vectors at multiples of 16 bytes
  const bool is_regular = computed_once(n_experts % Lanes::kSize == 0 && lanes.expert_at(kItems - 1) < n_experts &&
                                        reinterpret_cast<uintptr_t>(grad_logits) % 16 == 0);
  lanes.for_rows([&](const typename Lanes::Turn& turn) {
    float gradient[kItems];
    bool is_done = false;
    if constexpr (Lanes::kQuick) is_done = differentiate_ordinary(turn, gradient);
    if (!is_done) differentiate(turn, gradient);
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
