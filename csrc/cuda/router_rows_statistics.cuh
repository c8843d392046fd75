// The kernel that adds up the rows of a slot. One row is in router_rows_lanes.cuh.
#pragma once
#include "router_rows_lanes.cuh"

namespace ava {

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
  // An ordinary row: log2 sum e^z, and this lane's part of sum z p, which is 0 in rows that do not count. is_first: this
  // is the row's first lane, and the row counts.
  __device__ void add_ordinary(bool is_first, float log_total, float weighted) {
    const float lse = is_first ? log_total * kLn2 : 0.f;
    lse_squared = fmaf(lse, lse, lse_squared);
    entropies += lse - weighted;
    n_counted += is_first;
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
  enum { kGiven, kAtOnce, kOneByOne };
  constexpr bool kMayBeAtOnce = sizeof(Element) == 2 && kItems == 2 * kBest;
  const bool is_at_once = kMayBeAtOnce && !is_biased && arguments.k >= kLeastBest && arguments.k <= kBest;
  const int choice = computed_once(!arguments.new_choice ? kGiven : is_at_once ? kAtOnce : kOneByOne);
  bool every_expert_exists = true;
  const LastChoice last_choice(lanes.lanes(), int(arguments.k));
  // A row's weights, what they are multiplied by to be p, and what makes a weight a score that a bias is added to: p, or a
  // sigmoid before it is normalised. adds: also what is one number for the row.
  const auto measure = [&](const typename Lanes::Turn& turn, bool adds, float* weights, float& inverse, float& scale) {
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
    else if (adds && turn.counts() && lanes.lanes().own == 0)
      scalars.add(measured, of_logits);
    inverse = reciprocal_fast(1 + measured.rest);
    scale = kSigmoid ? exp_of(measured.max) : inverse;
  };
  // The same, where an ordinary row is done as such; what a row gets does not depend on the others of the warp.
  const auto measure_quickly = [&](const typename Lanes::Turn& turn, float* weights, float& inverse) {
    float z[kItems], total = 0, weighted = 0;
    const float largest = lanes.exponentiate(turn, z, weights);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      total += weights[i];
      weighted = fmaf(weights[i], z[i], weighted);
    }
    total = lanes.lanes().sum(total);
    const float log_total = log2_fast(total);
    const bool is_ordinary = lanes.is_ordinary(total, log_total, weighted, largest);
    inverse = reciprocal_fast(total);
    const auto add = [&] {
      scalars.add_ordinary(turn.counts() && lanes.lanes().own == 0, log_total, weighted * inverse);
    };
    if (!__any_sync(kWholeWarp, !is_ordinary)) return add();
    const bool is_done = lanes.lanes().all(is_ordinary);
    if (is_done) add();
    float other, scale;
    measure(turn, !is_done, weights, other, scale);
    if (is_done)
      lanes.exponentiate(turn, z, weights);  // again: there are too few registers to keep them
    else
      inverse = other;
  };

  lanes.for_rows([&](const typename Lanes::Turn& turn) {
    float weights[kItems], inverse, scale;
    if constexpr (Lanes::kQuick) {
      measure_quickly(turn, weights, inverse);
      scale = inverse;
    } else {
      measure(turn, true, weights, inverse, scale);
    }
    const float added = turn.counts() ? inverse : 0.f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) probability[i] = fmaf(weights[i], added, probability[i]);
    const auto add_chosen = [&](const ChosenItems& chosen) {
      if (!turn.counts()) return;
      choices.add(chosen);
      chosen.template for_each<kItems>([&](int i) { importance[i] = fmaf(weights[i], inverse, importance[i]); });
    };
    if (choice == kGiven) {
      every_expert_exists = lanes.for_given(turn, add_chosen) && every_expert_exists;
      return;
    }
    const auto choose_one_by_one = [&] {
      float scores[kItems];
      if (!is_biased) {
        lanes.read(turn, scores);
        return lanes.template choose<ScoreKey>(scores);
      }
      const float* const bias = arguments.expert_bias + lanes.layer() * arguments.n_experts;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int expert = lanes.expert_at(i);
        scores[i] = expert < arguments.n_experts ? weights[i] * scale + bias[expert] : -INFINITY;
      }
      return lanes.template choose<uint64_t>(scores);
    };
    ChosenItems chosen;
    bool is_found = false;
    if constexpr (kMayBeAtOnce)
      is_found = choice == kAtOnce && lanes.choose_best(turn, last_choice, inverse != inverse, chosen);
    if (!is_found) chosen = choose_one_by_one();
    lanes.store_choice(turn, chosen);
    add_chosen(chosen);
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

}  // namespace ava
