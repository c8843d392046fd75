// A router's row in the registers of 1 to 32 lanes, for up to 512 experts of 16 or 32 bits: read once, 16 bytes at a
// time where it is aligned. A warp takes 32 / n_lanes rows at once, so that few experts do not mean idle lanes.
#pragma once
#include "router_rows_arguments.cuh"

namespace ava {

constexpr int64_t kMostExpertsOfLanes = 512;

inline int items_of_lane(int64_t n_experts) { return n_experts <= 256 ? 8 : 16; }
inline int lanes_of_row(int64_t n_experts) {
  int n_lanes = 1;
  while (n_lanes * items_of_lane(n_experts) < n_experts) n_lanes *= 2;
  return n_lanes;
}

// kItems: logits that a lane holds, 8 up to 256 experts, else 16
template <class Element, int kItems, bool kSigmoid>
class RouterLanes {
 public:
  static constexpr int kSize = kVectorSize<Element>, kVectors = kItems / kSize;

  __device__ RouterLanes(const RouterArguments<float>& arguments, int n_lanes)
      : a_(arguments),
        n_lanes_(n_lanes),
        lane_(int(threadIdx.x) & (n_lanes - 1)),
        n_experts_(int(arguments.n_experts)),
        layer_(arguments.first_layer + blockIdx.y),
        rows_(arguments.rows_of_slot(blockIdx.x)) {}

  // Neighbouring lanes hold neighbouring vectors.
  __device__ int expert_at(int item) const { return (item / kSize * n_lanes_ + lane_) * kSize + item % kSize; }
  __device__ int lane() const { return lane_; }
  __device__ int64_t layer() const { return layer_; }
  __device__ int64_t group() const { return layer_ * a_.n_segments + rows_.segment; }
  __device__ bool is_in_group() const { return rows_.segment < a_.n_segments; }
  __device__ bool has_rows() const { return rows_.begin < rows_.end; }

  // body(row, counts, z): every row of the slot, the next one under way meanwhile. All lanes of the warp come along, so
  // that they can shuffle; row is -1 for those that have none. z is 0 in rows that do not count: they are not read.
  template <class Body>
  __device__ void for_rows(Body body) const {
    const int step = kRouterThreads / n_lanes_, first = int(threadIdx.x) / n_lanes_;
    uint4 bits[kVectors];
    int64_t row;
    bool counts;
    load(rows_.begin + first, row, counts, bits);
    for (int64_t base = rows_.begin; base < rows_.end; base += step) {
      uint4 next_bits[kVectors];
      int64_t next_row;
      bool next_counts;
      load(base + step + first, next_row, next_counts, next_bits);
      float z[kItems];
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
        unpack<Element>(bits[vector], z + vector * kSize);
        bits[vector] = next_bits[vector];
      }
      body(row, counts, z);
      row = next_row;
      counts = next_counts;
    }
  }

  // With e^u in `weights`. kEntropy: B too
  template <bool kEntropy>
  __device__ RouterRow<float> measure(const float* y, float* weights) const {
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; ++i) max = fmaxf(max, y[i]);
    for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, offset));
    float rest = 0, n_largest = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float u = y[i] - max, e = exp_of(u);
      weights[i] = e;
      rest += e == 1 ? 0.f : e;
      n_largest += e == 1 ? 1.f : 0.f;
      if constexpr (kEntropy) weighted = fmaf(e, fmaxf(lowest_u<float>(), u), weighted);
    }
    for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) {
      rest += __shfl_xor_sync(kWholeWarp, rest, offset);
      n_largest += __shfl_xor_sync(kWholeWarp, n_largest, offset);
      if constexpr (kEntropy) weighted += __shfl_xor_sync(kWholeWarp, weighted, offset);
    }
    return {max, rest + (n_largest - 1), weighted};
  }
  __device__ float sum_of_lanes(float value) const {
    for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
    return value;
  }
  __device__ static void effective(const float* z, float* y) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) y[i] = kSigmoid ? log_sigmoid(z[i]) : z[i];
  }

  // The k best of `scores`, -inf behind the last expert, in multiplicity and, where the row counts, in `choice`.
  __device__ void choose(int64_t row, bool counts, const float* scores, int* multiplicity) const {
    for (int64_t slot = 0; slot < a_.k; ++slot) {
      BestExpert<float> best;
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (!multiplicity[i]) best.offer(scores[i], expert_at(i));
      best.merge_lanes(n_lanes_);
#pragma unroll
      for (int i = 0; i < kItems; ++i) multiplicity[i] += expert_at(i) == best.expert;
      if (lane_ == 0 && row >= 0) a_.choice[(layer_ * a_.n_rows + row) * a_.k + slot] = counts ? best.expert : -1;
    }
  }
  // How often each expert was chosen for the row.
  template <bool kChecked>
  __device__ void count_choices(int64_t row, int* multiplicity) const {
    for (int64_t slot = 0; slot < a_.k; ++slot) {
      const int64_t expert = a_.choice_at(layer_, row, slot);
      if constexpr (kChecked) AVA_DEVICE_CHECK(expert >= 0 && expert < a_.n_experts);
#pragma unroll
      for (int i = 0; i < kItems; ++i) multiplicity[i] += expert_at(i) == expert;
    }
  }

 private:
  __device__ void load(int64_t place, int64_t& row, bool& counts, uint4* bits) const {
    row = place < rows_.end ? a_.row_at(place) : -1;
    counts = row >= 0 && is_in_group() && a_.counts_row(layer_, row);
    const Element* const z =
        static_cast<const Element*>(a_.logits[blockIdx.y]) + (counts ? row_offset(a_.layout, row) : 0);
    const bool aligned = reinterpret_cast<uintptr_t>(z) % 16 == 0;
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
      const int first = expert_at(vector * kSize);
      if (counts && aligned && first + kSize <= n_experts_) {
        bits[vector] = load16(z + first);
      } else {
        float values[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          values[i] = first + i >= n_experts_ ? -INFINITY : counts ? to_float(z[first + i]) : 0.f;
        bits[vector] = pack<Element>(values);
      }
    }
  }

  const RouterArguments<float>& a_;
  const int n_lanes_, lane_, n_experts_;
  const int64_t layer_;
  const RouterSlot rows_;
};

// Sums of a slot: each lane over its rows and the warp over its lanes in float, the block in double.
template <class Element, int kItems, bool kSigmoid>
__global__ void __launch_bounds__(kRouterThreads)
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
    int multiplicity[kItems] = {};
    if (!arguments.choice) {
      if (counts) lanes.template count_choices<true>(row, multiplicity);
    } else if (!arguments.expert_bias) {
      lanes.choose(row, counts, z, multiplicity);
    } else {
      // by p, or by sigmoids before they are normalised
      const float scale = kSigmoid ? exp_of(measured.max) : inverse;
      const float* const bias = arguments.expert_bias + lanes.layer() * arguments.n_experts;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int expert = lanes.expert_at(i);
        y[i] = expert < arguments.n_experts ? weights[i] * scale + bias[expert] : -INFINITY;
      }
      lanes.choose(row, counts, y, multiplicity);
    }
    if (!counts) return;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float p = weights[i] * inverse;
      probability[i] += p;
      if (multiplicity[i]) importance[i] += p * float(multiplicity[i]);
      choices[i] += multiplicity[i];
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
__global__ void __launch_bounds__(kRouterThreads)
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
    int multiplicity[kItems] = {};
    if (arguments.grad_importance && counts) lanes.template count_choices<false>(row, multiplicity);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      v[i] = multiplicity[i] ? common[i] + float(multiplicity[i]) * of_importance[i] : common[i];
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
      const float u = fmaxf(lowest_u<float>(), y[i] - measured.max);
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
