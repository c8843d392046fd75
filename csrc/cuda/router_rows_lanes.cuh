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

// A nan loses.
template <class Element, int kVectors>
__device__ __forceinline__ float largest_of(const uint4* bits) {  // [kVectors] of 16-bit elements
  using Pair = std::conditional_t<std::is_same<Element, __half>::value, __half2, __nv_bfloat162>;
  Pair pairs[4 * kVectors];
  memcpy(static_cast<void*>(pairs), bits, 16 * kVectors);
#pragma unroll
  for (int n = 2 * kVectors; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) pairs[i] = __hmax2(pairs[i], pairs[i + n]);
  }
  return fmaxf(to_float(pairs[0].x), to_float(pairs[0].y));
}

// kItems: logits that a lane holds, 16 where there are more than 8 experts: what a row costs besides its logits is shared
// by more of them
template <class Element, int kItems, bool kSigmoid>
class RouterLanes {
 public:
  static constexpr int kSize = kVectorSize<Element>, kVectors = kItems / kSize;
  // Ordinary rows of 16 bits are done with fewer instructions; the others as those of 32 bits and of sigmoids.
  static constexpr bool kQuick = sizeof(Element) == 2 && !kSigmoid;
  // What stands behind the last expert; where rows may be ordinary it has to be finite.
  static constexpr float kPadding = !kQuick ? -INFINITY : std::is_same<Element, __half>::value ? -65504.f : -0x1.fep127f;
  static constexpr float kLargestOrdinary = 32;
  static constexpr int kNoRow = INT32_MAX;

  // rows: router_row_bytes of shared memory
  __device__ RouterLanes(const RouterArguments<float>& arguments, int n_lanes, unsigned char* rows)
      : a_(arguments),
        lanes_(n_lanes),
        n_experts_(int(arguments.n_experts)),
        layer_(arguments.first_layer + blockIdx.y),
        slots_(shared_computed_once(reinterpret_cast<uint4*>(rows) + threadIdx.x)) {
    const RouterSlot slot = arguments.rows_of_slot(blockIdx.x);
    segment_ = int(slot.segment);
    begin_ = unsigned(slot.begin);
    end_ = unsigned(slot.end);
    flip_ = computed_once(slot.segment < arguments.n_segments ? 0 : -1);
    is_plain_ = computed_once(!arguments.order && !arguments.row_mask);
    const int64_t first_choice = row_of_all(0) * arguments.k;
    if (arguments.choice) choices_ = computed_once(arguments.choice + first_choice);
    if (arguments.indices) given_ = computed_once(arguments.indices + first_choice);
    if (arguments.wide_indices) given_ = computed_once(arguments.wide_indices + first_choice);
    const RowLayout& layout = arguments.layout;
    const int64_t row_bytes = layout.n_dims ? layout.strides[0] * int64_t(sizeof(Element)) : 0;
    own_logits_ = computed_once(static_cast<const unsigned char*>(arguments.logits[blockIdx.y]) + lanes_.own * 16);
    const bool is_regular = layout.n_dims <= 1 && row_bytes % 16 == 0 && row_bytes >= 0 && row_bytes <= INT32_MAX &&
                            reinterpret_cast<uintptr_t>(own_logits_) % 16 == 0 && n_experts_ % kSize == 0;
    row_bytes_ = is_regular && expert_at(kItems - 1) < n_experts_ ? int(row_bytes) : -1;
  }

  // Neighbouring lanes hold neighbouring vectors.
  __device__ int expert_at(int item) const { return (item / kSize * lanes_.n + lanes_.own) * kSize + item % kSize; }
  __device__ const LaneGroup& lanes() const { return lanes_; }
  __device__ int64_t layer() const { return layer_; }
  __device__ int64_t group() const { return layer_ * a_.n_segments + segment_; }
  __device__ bool is_in_group() const { return flip_ == 0; }
  __device__ bool has_rows() const { return begin_ < end_; }
  // of all layers
  __device__ int64_t row_of_all(int row) const { return layer_ * a_.n_rows + row; }

  // A row of this thread's. Lanes of a warp come along where they have none, so that they can shuffle.
  struct Turn {
    int number;
    int code;           // of the row
    const uint4* slot;  // of its first vector

    __device__ bool counts() const { return code >= 0; }  // else its logits are 0: they are not fetched
    __device__ unsigned row() const { return unsigned(code ^ code >> 31); }
    __device__ bool has_row() const { return code != ~kNoRow; }
  };
  // body(turn) for every row of the slot, the next three under way meanwhile.
  template <class Body>
  __device__ void for_rows(Body body) const {
    const unsigned step = unsigned(kRouterThreads / lanes_.n);
    const int n_turns = int((end_ - begin_ + step - 1) / step);
    unsigned place = begin_ + threadIdx.x / unsigned(lanes_.n);
    int rows[kRowStages] = {};  // those under way, see code_of
#pragma unroll 1
    for (int turn = -kRowsAhead; turn < n_turns; ++turn, place += step) {
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) rows[i] = rows[i + 1];
      rows[kRowsAhead] = code_of(place);
      fetch(rows[kRowsAhead], slot_of(turn + kRowsAhead));
      cp_async_commit();
      if (turn < 0) continue;
      cp_async_wait<kRowsAhead>();
      body(Turn{turn, rows[0], slot_of(turn)});
    }
  }
  // The row's logits, in the body, as often as they are wanted: cheaper than registers that keep them.
  __device__ static void read_bits(const Turn& turn, uint4* bits) {
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) bits[vector] = turn.slot[vector * kRouterThreads];
  }
  __device__ void read(const Turn& turn, float* z) const {
    uint4 bits[kVectors];
    read_bits(turn, bits);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) unpack<Element>(bits[vector], z + vector * kSize);
    if (kQuick && is_padded()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (expert_at(i) >= n_experts_) z[i] = -INFINITY;
    }
  }

  // An ordinary row is neither so far from 0 that e^z would lose digits or overflow, nor so sure of an expert that 1 - p
  // has lost digits, nor has it a logit of nan or -inf: sum z e^z would be nan. Its maximum is not needed. Of the log2 of
  // the row's sum e^z, of this lane's part of sum z e^z, and of this lane's largest e^z.
  __device__ static bool is_ordinary(float total, float log_total, float weighted, float largest) {
    return total >= (1 + kSureRest<float>) * largest && fabsf(log_total) <= kLargestOrdinary && weighted == weighted;
  }
  // z and e^z; returns the largest e^z of this lane
  __device__ static float exponentiate(const Turn& turn, float* z, float* weights) {
    uint4 bits[kVectors];
    read_bits(turn, bits);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) unpack<Element>(bits[vector], z + vector * kSize);
#pragma unroll
    for (int i = 0; i < kItems; ++i) weights[i] = exp2_fast(z[i] * kLog2e);
    return exp2_fast(largest_of<Element, kVectors>(bits) * kLog2e);
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
  __device__ void read_effective(const Turn& turn, float* y) const {
    read(turn, y);
    if constexpr (kSigmoid) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) y[i] = log_sigmoid(y[i]);
    }
  }

  // The k best of `scores`, -inf behind the last expert, which also go to `choice`.
  template <class Key>
  __device__ ChosenItems choose(const Turn& turn, const float* scores) const {
    uint32_t ranks[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) ranks[i] = uint32_t(rank_of(scores[i])) ^ 0x80000000u;
    // keys of 64 bits do not stay in registers, of which there are too few
    const auto key = [&](int i) {
      return choice_key<Key>(sizeof(Key) == 4 ? ranks[i] : computed_again(ranks[i]), expert_at(i));
    };
    int32_t* const choice = choice_of(turn);
    const int k = int(a_.k);
    ChosenItems chosen;
    Key last = kAboveKeys<Key>;
#pragma unroll 1
    for (int which = 0; which < k; ++which) {
      // the largest key below the last one: below it differences wrap around to the top
      Key best = key(0) - last;
#pragma unroll
      for (int i = 1; i < kItems; ++i) {
        const Key other = key(i) - last;
        best = other > best ? other : best;
      }
      last += lanes_.largest(best);
      const int expert = expert_of_key(last);
      chosen.add(twice_position(expert) - 2 * lanes_.own * kItems);
      if (lanes_.own == 0 && turn.has_row()) choice[which] = turn.counts() ? expert : -1;
    }
    return chosen;
  }
  // The same for scores of 16 bits, where there are at most kBest choices: add(item) for those of rows that count.
  template <class Add>
  __device__ void choose_best(const Turn& turn, const BestOfLanes& best_of_lanes, Add add) const {
    uint4 bits[kVectors];
    read_bits(turn, bits);
    int keys[kItems], best[kBest];
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
      const uint32_t words[4] = {bits[vector].x, bits[vector].y, bits[vector].z, bits[vector].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int item = vector * kSize + 2 * i;
        pair_of_keys<Element>(words[i], expert_at(item), keys + item);
      }
    }
    if (is_padded()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (expert_at(i) >= n_experts_) keys[i] = INT32_MIN;
    }
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
    const int last = best_of_lanes.merge(best, [&](auto n_keys, const int* own, int place) {
      constexpr int kKeys = decltype(n_keys)::value;
      const int k = int(a_.k);
      int32_t* const choice = choice_of(turn) + place;
      const int n_written = turn.has_row() && lanes_.own < kBest / kKeys ? k - place : 0;
      int last = own[0];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (i <= ((k - 1) & (kKeys - 1))) last = own[i];
        if (i < n_written) choice[i] = turn.counts() ? expert_of_key(own[i]) : -1;
      }
      return lanes_.broadcast(last, best_of_lanes.last_lane());
    });
    const int least = turn.counts() ? last : INT32_MAX;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (keys[i] >= least) add(i);
  }
  // use(chosen) for the row's choices that were given; one at a time where a row chose an expert twice.
  // False where there is no such expert.
  template <class Use>
  __device__ bool for_given(const Turn& turn, Use use) const {
    const int k = int(a_.k);
    const uint64_t at = uint64_t(turn.row()) * unsigned(k) + unsigned(lanes_.own);
    bool every_expert_exists = true;
    // each(twice the item of this lane, or beyond) for every choice; each lane reads one of them at a time
    const auto for_each = [&](auto n_at_once, auto each) {
#pragma unroll 1
      for (int first = 0; first < k; first += lanes_.n) {
        int own = -1;  // in no lane
        if (turn.counts() && first + lanes_.own < k) {
          const int64_t expert = a_.wide_indices ? static_cast<const int64_t*>(given_)[at + unsigned(first)]
                                                 : static_cast<const int32_t*>(given_)[at + unsigned(first)];
          every_expert_exists = every_expert_exists && expert >= 0 && expert < a_.n_experts;
          own = twice_position(int(expert));
        }
        const int n = k - first < lanes_.n ? k - first : lanes_.n;
#pragma unroll 1
        for (int which = 0; which < n; which += decltype(n_at_once)::value) {
#pragma unroll
          for (int i = 0; i < decltype(n_at_once)::value; ++i)
            each(lanes_.broadcast(own, which + i) - 2 * lanes_.own * kItems);
        }
      }
    };
    ChosenItems all;
    const auto add = [&](int twice_item) { all.add(twice_item); };
    if (lanes_.n >= 4)
      for_each(std::integral_constant<int, 4>(), add);
    else
      for_each(std::integral_constant<int, 1>(), add);
    if (!__any_sync(kWholeWarp, all.repeated != 0)) {
      use(all);
    } else {
      for_each(std::integral_constant<int, 1>(), [&](int twice_item) {
        ChosenItems one;
        one.add(twice_item);
        use(one);
      });
    }
    return every_expert_exists;
  }

 private:
  __device__ int32_t* choice_of(const Turn& turn) const {  // own ones
    return choices_ + uint64_t(turn.row()) * unsigned(a_.k);
  }
  // Twice the number of an expert's logit among those of the row's lanes, lane by lane.
  __device__ int twice_position(int expert) const {
    const unsigned vector = unsigned(expert) / kSize;
    const unsigned lane = vector & (lanes_.n - 1), of_lane = vector >> lanes_.n_bits;
    return 2 * int(lane * kItems + of_lane * kSize + unsigned(expert) % kSize);
  }

  __device__ bool is_padded() const { return n_experts_ < lanes_.n * kItems; }  // more items than experts
  __device__ uint4* slot_of(int turn) const { return slots_ + unsigned(turn) % kRowStages * kVectors * kRouterThreads; }
  // The row at a place; as ~row where it does not count, ~kNoRow where there is none.
  __device__ int code_of(unsigned place) const {
    if (place >= end_) return ~kNoRow;
    if (is_plain_) return int(place) ^ flip_;
    const int row = a_.order ? int(a_.order[place]) : int(place);
    return flip_ == 0 && a_.counts_row(layer_, row) ? row : ~row;
  }
  // Sends for it.
  __device__ void fetch(int code, uint4* slot) const {
    if ((code | row_bytes_) < 0) return fetch_elements(code ^ code >> 31, code >= 0, slot);
    const unsigned char* const own = own_logits_ + uint64_t(unsigned(code)) * unsigned(row_bytes_);
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector)
      cp_async16(slot + vector * kRouterThreads, own + vector * unsigned(lanes_.n * 16));
  }
  __device__ void fetch_elements(int row, bool counts, uint4* slot) const {
    const Element* const z =
        reinterpret_cast<const Element*>(own_logits_ - lanes_.own * 16) +
        (counts ? row_offset(a_.layout, uint32_t(row)) : 0);
    const bool aligned = counts && reinterpret_cast<uintptr_t>(z) % 16 == 0;
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
      const int first = expert_at(vector * kSize);
      if (aligned && first + kSize <= n_experts_) {
        cp_async16(slot + vector * kRouterThreads, z + first);
      } else {
        float values[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          values[i] = first + i >= n_experts_ ? kPadding : counts ? to_float(z[first + i]) : 0.f;
        slot[vector * kRouterThreads] = pack<Element>(values);
      }
    }
  }
  const RouterArguments<float>& a_;
  const LaneGroup lanes_;
  const int n_experts_;
  const int64_t layer_;
  uint4* const slots_;           // this thread's, one in kRouterThreads
  int segment_;
  unsigned begin_, end_;  // the slot's rows
  int flip_;              // -1 if they are in no group, else 0
  int is_plain_;          // rows are at their places, and all count
  int32_t* choices_ = nullptr;   // of the layer
  const void* given_ = nullptr;  // of the layer, 64 or 32 bits
  const unsigned char* own_logits_;  // of the layer, from this lane's first vector on
  int row_bytes_;                    // between rows whose vectors are whole and aligned; else -1
};

}  // namespace ava
