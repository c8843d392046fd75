// A router's row in the registers of 1 to 32 lanes, for up to 512 experts of 16 or 32 bits: fetched once, 16 bytes at a
// time where it is aligned, three rows ahead. A warp takes 32 / n_lanes rows at once, so that few experts do not mean
// idle lanes.
#pragma once
#include "router_rows_choice.cuh"
#include "softmax_rows_exponent.cuh"

namespace ava {

constexpr int64_t kMostExpertsOfLanes = 512;
constexpr int kRowsAhead = 3, kRowStages = kRowsAhead + 1;  // copies under way hide the memory's latency

inline int items_of_lane(int64_t n_experts) { return n_experts <= 8 ? 8 : 16; }
inline int lanes_of_row(int64_t n_experts) {
  int n_lanes = 1;
  while (n_lanes * items_of_lane(n_experts) < n_experts) n_lanes *= 2;
  return n_lanes;
}
// of the rows that are under way
inline size_t router_row_bytes(int64_t n_experts, int element_bytes) {
  return size_t(kRowStages) * kRouterThreads * items_of_lane(n_experts) * element_bytes;
}

// kItems: logits that a lane holds, 16 where there are more than 8 experts: what a row costs besides its logits is shared
// by more of them
template <class Element, int kItems, bool kSigmoid>
class RouterLanes {
 public:
  static constexpr int kSize = kVectorSize<Element>, kVectors = kItems / kSize;

  // rows: router_row_bytes of shared memory
  __device__ RouterLanes(const RouterArguments<float>& arguments, int n_lanes, unsigned char* rows)
      : a_(arguments),
        lanes_(n_lanes),
        n_experts_(int(arguments.n_experts)),
        layer_(arguments.first_layer + blockIdx.y),
        logits_(static_cast<const Element*>(arguments.logits[blockIdx.y])),
        slots_(reinterpret_cast<uint4*>(rows) + threadIdx.x) {
    const RouterSlot slot = arguments.rows_of_slot(blockIdx.x);
    segment_ = int(slot.segment);
    begin_ = int(slot.begin);
    end_ = int(slot.end);
    counted_end_ = slot.segment < arguments.n_segments ? end_ : begin_;
  }

  // Neighbouring lanes hold neighbouring vectors.
  __device__ int expert_at(int item) const { return (item / kSize * lanes_.n + lanes_.own) * kSize + item % kSize; }
  __device__ const LaneGroup& lanes() const { return lanes_; }
  __device__ int64_t layer() const { return layer_; }
  __device__ int64_t group() const { return layer_ * a_.n_segments + segment_; }
  __device__ bool is_in_group() const { return counted_end_ > begin_; }
  __device__ bool has_rows() const { return begin_ < end_; }
  // of all layers
  __device__ int64_t row_of_all(int row) const { return layer_ * a_.n_rows + row; }

  // body(turn, row, counts): every row of the slot, the next three under way meanwhile. All lanes of the warp come along,
  // so that they can shuffle; row is -1 for those that have none. Logits are 0 in rows that do not count: those are not
  // fetched.
  template <class Body>
  __device__ void for_rows(Body body) const {
    const int step = kRouterThreads / lanes_.n, n_turns = (end_ - begin_ + step - 1) / step;
    const int first = begin_ + int(threadIdx.x) / lanes_.n;
#pragma unroll 1
    for (int turn = -kRowsAhead; turn < n_turns; ++turn) {
      const int ahead = turn + kRowsAhead;
      if (ahead < n_turns) {
        const int place = first + ahead * step, row = row_at(place);
        fetch(row, counts(place, row), ahead);
      }
      cp_async_commit();
      if (turn < 0) continue;
      const int place = first + turn * step, row = row_at(place);
      cp_async_wait<kRowsAhead>();
      body(turn, row, counts(place, row));
    }
  }
  // The row's logits, in the body, as often as they are wanted: cheaper than registers that keep them.
  __device__ void read(int turn, float* z) const {
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) unpack<Element>(slot(turn, vector), z + vector * kSize);
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

  // y becomes u, `weights` e^u. kEntropy: B too
  template <bool kEntropy>
  __device__ RouterRow<float> measure(float* y, float* weights) const {
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; ++i) max = fmaxf(max, y[i]);
    max = lanes_.max(max);
    float total = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      y[i] = bounded_u(y[i], max);
      weights[i] = exponential(y[i]);
      total += weights[i];
      if constexpr (kEntropy) weighted = fmaf(weights[i], y[i], weighted);
    }
    total = lanes_.sum(total);
    if constexpr (kEntropy) weighted = lanes_.sum(weighted);
    float rest = total - 1;
    if (__any_sync(kWholeWarp, rest < kSureRest<float>)) {
      float others = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) others += weights[i] == 1 ? 0.f : weights[i];
      others = lanes_.sum(others);
      if (rest < kSureRest<float>) rest = others;
    }
    return {max, rest, weighted};
  }
  __device__ void read_effective(int turn, float* y) const {
    read(turn, y);
    if constexpr (kSigmoid) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) y[i] = log_sigmoid(y[i]);
    }
  }

  // The k best of `scores`, -inf behind the last expert, which also go to `choice`.
  template <class Key>
  __device__ ChosenItems choose(int row, bool counts, const float* scores) const {
    Key keys[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) keys[i] = choice_key<Key>(scores[i], expert_at(i));
    int32_t* const choice = a_.choice + row_of_all(row) * a_.k;
    const bool writes = lanes_.own == 0 && row >= 0;
    const int k = int(a_.k);
    ChosenItems chosen;
    Key last = kAboveKeys<Key>;
#pragma unroll 1
    for (int which = 0; which < k; ++which) {
      // the largest key below the last one: below it differences wrap around to the top
      Key best = keys[0] - last;
#pragma unroll
      for (int i = 1; i < kItems; ++i) best = keys[i] - last > best ? keys[i] - last : best;
      last += lanes_.largest(best);
      const int expert = expert_of_key(last);
      chosen.add(twice_position(expert) - 2 * lanes_.own * kItems);
      if (writes) choice[which] = counts ? expert : -1;
    }
    return chosen;
  }
  // The same for scores of 16 bits, where there are at most kBest choices.
  __device__ ChosenItems choose_best(int row, bool counts, const float* scores) const {
    int keys[kItems], best[kBest];
#pragma unroll
    for (int i = 0; i < kItems; ++i) keys[i] = signed_choice_key(scores[i], expert_at(i));
#pragma unroll
    for (int i = 0; i < kBest; ++i) best[i] = keys[i];
    sort_best(best);
    if constexpr (kItems > kBest) {
      int others[kBest];
#pragma unroll
      for (int i = 0; i < kBest; ++i) others[i] = keys[kBest + i];
      sort_best(others);
      merge_best(best, [&](int i) { return others[i]; });
    }
#pragma unroll 1
    for (int offset = 1; offset < lanes_.n; offset *= 2)
      merge_best(best, [&](int i) { return __shfl_xor_sync(kWholeWarp, best[i], offset); });

    const int k = int(a_.k);
    int last = best[kBest - 1];
    if (k < kBest) {
#pragma unroll
      for (int i = kLeastBest; i < kBest; ++i)
        if (i == k) last = best[i - 1];
    }
    ChosenItems chosen;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (keys[i] >= last) chosen.bits |= 1u << 2 * i;
    if (lanes_.own == 0 && row >= 0) {
      int32_t* const choice = a_.choice + row_of_all(row) * k;
      const unsigned absent = counts ? 0 : ~0u;
      unsigned experts[kBest];
#pragma unroll
      for (int i = 0; i < kBest; ++i) experts[i] = unsigned(expert_of_key(best[i])) | absent;
      if (k == kBest && reinterpret_cast<uintptr_t>(choice) % 16 == 0) {
        store16(choice, {experts[0], experts[1], experts[2], experts[3]});
        store16(choice + 4, {experts[4], experts[5], experts[6], experts[7]});
      } else {
#pragma unroll
        for (int i = 0; i < kBest; ++i)
          if (i < k) choice[i] = int32_t(experts[i]);
      }
    }
    return chosen;
  }
  // use(chosen) for the row's choices that were given; one at a time where a row chose an expert twice.
  template <bool kChecked, class Use>
  __device__ void for_given(int row, bool counts, Use use) const {
    const int k = int(a_.k);
    const int64_t at = row_of_all(row) * k + lanes_.own;
    // each(twice the item of this lane, or beyond) for every choice; each lane reads one of them at a time
    const auto for_each = [&](auto unrolled, auto each) {
#pragma unroll 1
      for (int first = 0; first < k; first += lanes_.n) {
        const int n = k - first < lanes_.n ? k - first : lanes_.n;
        int own = -1;  // in no lane
        if (counts && lanes_.own < n) {
          const int64_t expert = a_.wide_indices ? a_.wide_indices[at + first] : a_.indices[at + first];
          if constexpr (kChecked) AVA_DEVICE_CHECK(expert >= 0 && expert < a_.n_experts);
          own = twice_position(int(expert));
        }
#pragma unroll(decltype(unrolled)::value)
        for (int which = 0; which < n; ++which) each(lanes_.broadcast(own, which) - 2 * lanes_.own * kItems);
      }
    };
    ChosenItems all;
    for_each(std::integral_constant<int, 4>(), [&](int twice_item) { all.add(twice_item); });
    if (!__any_sync(kWholeWarp, all.repeated != 0)) return use(all);
    for_each(std::integral_constant<int, 1>(), [&](int twice_item) {
      ChosenItems one;
      one.add(twice_item);
      use(one);
    });
  }

 private:
  // Twice the number of an expert's logit among those of the row's lanes, lane by lane.
  __device__ int twice_position(int expert) const {
    const unsigned vector = unsigned(expert) / kSize;
    const unsigned lane = vector & (lanes_.n - 1), of_lane = vector >> lanes_.n_bits;
    return 2 * int(lane * kItems + of_lane * kSize + unsigned(expert) % kSize);
  }

  __device__ int row_at(int place) const { return place < end_ ? int(a_.row_at(place)) : -1; }
  __device__ bool counts(int place, int row) const { return place < counted_end_ && a_.counts_row(layer_, row); }

  __device__ uint4& slot(int turn, int vector) const {
    return slots_[(unsigned(turn) % kRowStages * kVectors + vector) * kRouterThreads];
  }
  __device__ void fetch(int row, bool counts, int turn) const {
    const Element* const z = logits_ + (counts ? row_offset(a_.layout, uint32_t(row)) : 0);
    const bool aligned = counts && reinterpret_cast<uintptr_t>(z) % 16 == 0;
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
      const int first = expert_at(vector * kSize);
      if (aligned && first + kSize <= n_experts_) {
        cp_async16(&slot(turn, vector), z + first);
      } else {
        float values[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          values[i] = first + i >= n_experts_ ? -INFINITY : counts ? to_float(z[first + i]) : 0.f;
        slot(turn, vector) = pack<Element>(values);
      }
    }
  }

  const RouterArguments<float>& a_;
  const LaneGroup lanes_;
  const int n_experts_;
  const int64_t layer_;
  const Element* const logits_;  // of the layer
  uint4* const slots_;           // this thread's, one in kRouterThreads
  int segment_, begin_, end_;    // the slot's rows
  int counted_end_;              // begin_, if they are in no group
};

}  // namespace ava
