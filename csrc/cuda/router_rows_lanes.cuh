// A router's row in the registers of 1 to 32 lanes, for up to 512 experts of 16 or 32 bits: read once, 16 bytes at a
// time where it is aligned. A warp takes 32 / n_lanes rows at once, so that few experts do not mean idle lanes.
#pragma once
#include "router_rows_arguments.cuh"
#include "softmax_rows_exponent.cuh"

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

  // u, bounded so that 0 * u is 0 where a logit is -inf; a nan stays one
  __device__ static float bounded_u(float y, float max) { return max_keep_nan(y - max, lowest_u<float>()); }
  // e^u to 2 ulp for float32, whose 4 bytes leave time for it; else within |u| 2^-23
  __device__ static float exponential(float u) {
    const float steps = u * kLog2e, e = exp2_fast(steps);
    if constexpr (sizeof(Element) == 2) return e;
    const float lost = fmaf(u, kLog2eLow, fmaf(u, kLog2e, -steps));
    return fmaf(e, lost * kLn2, e);
  }

  // With e^u in `weights`. kEntropy: B too
  template <bool kEntropy>
  __device__ RouterRow<float> measure(const float* y, float* weights) const {
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; ++i) max = fmaxf(max, y[i]);
#pragma unroll 1
    for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, offset));
    float total = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float u = bounded_u(y[i], max);
      weights[i] = exponential(u);
      total += weights[i];
      if constexpr (kEntropy) weighted = fmaf(weights[i], u, weighted);
    }
#pragma unroll 1
    for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(kWholeWarp, total, offset);
      if constexpr (kEntropy) weighted += __shfl_xor_sync(kWholeWarp, weighted, offset);
    }
    float rest = total - 1;
    if (__any_sync(kWholeWarp, rest < kSureRest<float>)) {
      float others = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) others += weights[i] == 1 ? 0.f : weights[i];
      others = sum_of_lanes(others);
      if (rest < kSureRest<float>) rest = others;
    }
    return {max, rest, weighted};
  }
  __device__ float sum_of_lanes(float value) const {
#pragma unroll 1
    for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
    return value;
  }
  __device__ static void effective(const float* z, float* y) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) y[i] = kSigmoid ? log_sigmoid(z[i]) : z[i];
  }

  // The k best of `scores`, -inf behind the last expert: bit i for item i, and where the row counts, in `choice`.
  __device__ unsigned choose(int64_t row, bool counts, const float* scores) const {
    int ranks[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) ranks[i] = rank_of(scores[i]);
    unsigned chosen = 0;
#pragma unroll 1
    for (int64_t slot = 0; slot < a_.k; ++slot) {
      int best = ranks[0], item = 0;
#pragma unroll
      for (int i = 1; i < kItems; ++i)
        if (ranks[i] > best) best = ranks[i], item = i;
      const int own = expert_at(item);
      int expert = own;
#pragma unroll 1
      for (int offset = n_lanes_ / 2; offset > 0; offset /= 2) {
        const int other_best = __shfl_xor_sync(kWholeWarp, best, offset);
        const int other = __shfl_xor_sync(kWholeWarp, expert, offset);
        if (other_best > best || (other_best == best && other < expert)) best = other_best, expert = other;
      }
      if (own == expert) {
        chosen |= 1u << item;
#pragma unroll
        for (int i = 0; i < kItems; ++i) ranks[i] = i == item ? INT32_MIN : ranks[i];
      }
      if (lane_ == 0 && row >= 0) a_.choice[(layer_ * a_.n_rows + row) * a_.k + slot] = counts ? expert : -1;
    }
    return chosen;
  }
  // change(i) for every choice of the row that is item i of this lane
  template <bool kChecked, class Change>
  __device__ void for_choices(int64_t row, Change change) const {
#pragma unroll 1
    for (int64_t slot = 0; slot < a_.k; ++slot) {
      const int64_t chosen = a_.choice_at(layer_, row, slot);
      if constexpr (kChecked) AVA_DEVICE_CHECK(chosen >= 0 && chosen < a_.n_experts);
      const int expert = int(chosen);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (expert_at(i) == expert) change(i);
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

}  // namespace ava
