// What the lanes of a router's row do together: sums and maxima over them, and the choice of experts.
#pragma once
#include "router_rows_arguments.cuh"

namespace ava {

// The lanes of a warp that share a row: a power of two of neighbours. The last two shuffles are done whatever their number:
// a step over lanes that belong to other rows shuffles with itself instead, which leaves a maximum as it is and doubles a
// sum; `once` takes that back, exactly.
struct LaneGroup {
  int n, n_bits, own;    // n = 2^n_bits
  int offset2, offset1;  // 0: a step with itself
  float once;

  __device__ explicit LaneGroup(int n_lanes)
      : n(n_lanes),
        own(int(threadIdx.x) & (n_lanes - 1)),
        offset2(n_lanes > 2 ? 2 : 0),
        offset1(n_lanes > 1 ? 1 : 0),
        once(n_lanes < 4 ? float(n_lanes) / 4 : 1.f) {
    n_bits = __ffs(n_lanes) - 1;  // not above: nvcc's pass over the host's code looks at what stands there
  }

  // step(value, offset) for every offset of a butterfly
  template <class Value, class Step>
  __device__ __forceinline__ Value butterfly(Value value, Step step) const {
    if (n > 4) {
      if (n > 8) {
        if (n > 16) value = step(value, 16);
        value = step(value, 8);
      }
      value = step(value, 4);
    }
    return step(step(value, offset2), offset1);
  }
  __device__ __forceinline__ float sum(float value) const {
    return once *
           butterfly(value, [](float sum, int offset) { return sum + __shfl_xor_sync(kWholeWarp, sum, offset); });
  }
  __device__ __forceinline__ int sum(int value) const {
    const int sum =
        butterfly(value, [](int sum, int offset) { return sum + __shfl_xor_sync(kWholeWarp, sum, offset); });
    return n < 4 ? sum >> (2 - n_bits) : sum;
  }
  __device__ __forceinline__ void sum(float& first, float& second) const {
    struct Two {
      float first, second;
    };
    const Two sums = butterfly(Two{first, second}, [](Two sum, int offset) {
      return Two{sum.first + __shfl_xor_sync(kWholeWarp, sum.first, offset),
                 sum.second + __shfl_xor_sync(kWholeWarp, sum.second, offset)};
    });
    first = once * sums.first;
    second = once * sums.second;
  }
  // In every lane of the row.
  __device__ __forceinline__ bool all(bool value) const {
    const unsigned lanes_of_row = (n < 32 ? (1u << n) - 1 : ~0u) << (threadIdx.x % 32 - own);
    return (~__ballot_sync(kWholeWarp, value) & lanes_of_row) == 0;
  }
  // A nan loses.
  __device__ __forceinline__ float max(float value) const {
    return butterfly(value, [](float max, int offset) { return fmaxf(max, __shfl_xor_sync(kWholeWarp, max, offset)); });
  }
  template <class Key>
  __device__ __forceinline__ Key largest(Key value) const {
    return butterfly(value, [](Key largest, int offset) {
      const Key other = __shfl_xor_sync(kWholeWarp, largest, offset);
      return other > largest ? other : largest;
    });
  }
  __device__ int lane_of_warp(int lane) const { return int(threadIdx.x) % 32 - own + lane; }
  // of the group's lane of this number
  __device__ __forceinline__ int broadcast(int value, int lane) const {
    return __shfl_sync(kWholeWarp, value, lane_of_warp(lane));
  }
};

// Which items of a lane were chosen: item 2 i is bit 2 i, item 2 i + 1 is bit 2 i + 16, where a comparison of two pairs of
// 16 bits puts them.
struct ChosenItems {
  uint32_t bits = 0, repeated = 0;  // repeated: those that were chosen before

  __device__ static constexpr int bit_of(int item) { return (item & ~1) | (item & 1) << 4; }
  // the bit of an item of this lane, or any other number
  __device__ void add(int number) {
    const uint32_t bit = bit_at(unsigned(number));
    repeated |= bits & bit;
    bits |= bit;
  }
  __device__ void remove(int item) { bits &= ~(1u << bit_of(item)); }
  // use(item), in the order of bits, which become predicates four by four
  template <int kItems, class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
      for (int item = odd; item < kItems; item += 2)
        if (bits >> bit_of(item) & 1) use(item);
    }
  }
  // item i as bit i
  __device__ uint32_t in_order() const { return (bits | bits >> 15) & 0xffffu; }
  __device__ static ChosenItems from_order(uint32_t items) { return {(items & 0x5555u) | (items & 0xaaaau) << 15}; }
};

// How often they were, 8 bits for each: a thread has 16 rows of a slot at most.
constexpr int kMostGivenChoices = 15;
struct ChoiceCounts {
  uint32_t words[4] = {};  // the item of bit 8 m + 2 j is byte m of word j

  __device__ void add(const ChosenItems& chosen) {
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] += chosen.bits >> 2 * j & 0x01010101u;
  }
  __device__ int of(int item) const {
    const int bit = ChosenItems::bit_of(item);
    return int(words[bit % 8 / 2] >> (bit & ~7) & 255);
  }
};

// A score and its expert as one number, larger for what is chosen first (ranks_before): no two are equal. Scores of 16
// bits, which have 19 as the upper ones of float32, fit into 32 bits with it.
constexpr int kExpertBits = 9;
template <class Key>
constexpr int kUnusedRankBits = sizeof(Key) == 4 ? 13 : 0;
template <class Key>
constexpr Key kAboveKeys = Key(1) << (32 - kUnusedRankBits<Key> + kExpertBits);

template <class Key>
__device__ Key choice_key(uint32_t rank, int expert) {  // rank_of(score) without its sign
  return Key(rank >> kUnusedRankBits<Key>) << kExpertBits | Key((1 << kExpertBits) - 1 - expert);
}
template <class Key>
__device__ int expert_of_key(Key key) {
  return int(~key & ((1 << kExpertBits) - 1));
}

// The largest scores of 16 bits that a lane holds, largest first: two lists of 8, one in each half of pairs. The last
// choice is found by networks of comparisons, each for both halves at once: in the lane, then over lanes (LastChoice).
constexpr int kBest = 8, kLeastBest = 3;  // for fewer choices one after the other is cheaper

template <class Pair>
__device__ __forceinline__ void put_larger_first(Pair& x, Pair& y) {
  const Pair larger = __hmax2(x, y);
  y = __hmin2(x, y);
  x = larger;
}
template <class Pair>
__device__ __forceinline__ void sort_best(Pair* scores) {  // [kBest]
  constexpr int kPairs[][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                               {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (int i = 0; i < 19; ++i) put_larger_first(scores[kPairs[i][0]], scores[kPairs[i][1]]);
}

// The k-th largest of the scores of a row, in both halves of a pair; k <= 8, and there is no nan. Of two lists a and b of
// 8 scores each, c_i = max(a_i, b_{7 - i}) are the best; they rise and fall, so that comparisons at distances 4, 2, 1 sort
// them. So the lists of two lanes become one, those of two pairs of lanes, and so on, at last those of both halves.
//
// Both lanes that compare would do the same: so each keeps half of the list, then half of that, until it has one score of
// the list. Lanes that compare have to know the score's place in the list, whose bits are 4 L2 + 2 L1 + L0. With each merge
// one more of these bits is told by the lane: a list of 2^s lanes, s <= 3, has s of them, the others are the number of the
// score in the lane. The lane of the list b keeps the places 7 - i where that of a keeps i, which turns every bit. So the
// bits of a place are parities of the lane's bits l0, l1, ...: L2 = l0 ^ ... ^ l_{s-1}, L1 = l1 ^ ... ^ l_{s-1}, L0 = l2 ^
// ... ^ l_{s-1}; and only L2 is another one in lane l ^ 1, L1 in l ^ 3, L0 in l ^ 6.
class LastChoice {
 public:
  __device__ LastChoice(const LaneGroup& lanes, int k) : lanes_(lanes) {
    unsigned smaller = 0;
#pragma unroll
    for (int n_steps = 1; n_steps <= 5; ++n_steps) {
#pragma unroll
      for (int bit = 0; bit < 3; ++bit)
        smaller |= unsigned(__popc(unsigned(lanes.own) % (1u << n_steps) >> (2 - bit)) & 1) << (3 * n_steps + bit);
    }
    const int n_bits = lanes.n_bits < 3 ? lanes.n_bits : 3;  // of a place that the lane tells
    // the bits of a lane from those of a place: l0 = L2 ^ L1, ...
    const unsigned last = unsigned(k - 1) >> (3 - n_bits);
    last_lane_ = computed_once(n_bits ? int(__brev(last ^ last << 1) >> (32 - n_bits)) : 0);
    smaller_ = unsigned(computed_once(int(smaller)));
    last_ = computed_once(k - 1);
  }

  template <class Pair>
  __device__ __forceinline__ Pair of(Pair* lists) const {  // [kBest] of this lane, sorted
    if (lanes_.n == 1) return last_of_halves<8>(lists, 0);
    halve<8>(lists, 1);
    sort<4, true>(lists, 1);
    if (lanes_.n == 2) return last_of_halves<4>(lists, 1);
    halve<4>(lists, 3);
    sort<2, true>(lists, 2);
    if (lanes_.n == 4) return last_of_halves<2>(lists, 2);
    halve<2>(lists, 6);
    sort<1, true>(lists, 3);
    if (lanes_.n == 8) return last_of_halves<1>(lists, 3);
    merge_whole(lists, 12, 4);
    if (lanes_.n == 16) return last_of_halves<1>(lists, 4);
    merge_whole(lists, 20, 5);
    return last_of_halves<1>(lists, 5);
  }

 private:
  // Whether this bit of a place in this lane is 1, in lists of 2^n_steps lanes.
  __device__ bool keeps_smaller(int n_steps, int bit) const { return smaller_ >> (3 * n_steps + bit) & 1; }
  template <class Pair>
  __device__ __forceinline__ static Pair other_of(Pair value, int offset) {
    return __shfl_xor_sync(kWholeWarp, value, offset);
  }
  // The larger ones of this list and the other.
  template <int kScores, class Pair>
  __device__ __forceinline__ static void halve(Pair* lists, int offset) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) lists[i] = __hmax2(lists[i], other_of(lists[kScores - 1 - i], offset));
  }
  // kReversed: the other lane has the places in the opposite order
  template <int kScores, bool kReversed, class Pair>
  __device__ __forceinline__ static void exchange(Pair* lists, int offset, bool keeps_smaller) {
    Pair others[kScores];
#pragma unroll
    for (int i = 0; i < kScores; ++i) others[i] = other_of(lists[kReversed ? kScores - 1 - i : i], offset);
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      lists[i] = keeps_smaller ? __hmin2(lists[i], others[i]) : __hmax2(lists[i], others[i]);
  }
  // Lists that rise and fall, of 2^n_steps lanes. kMerged: of two lists, whose lanes have the places in opposite orders
  template <int kScores, bool kMerged, class Pair>
  __device__ __forceinline__ void sort(Pair* lists, int n_steps) const {
    if constexpr (kScores <= 4) exchange<kScores, kMerged && kScores == 4>(lists, 1, keeps_smaller(n_steps, 2));
    if constexpr (kScores <= 2) exchange<kScores, kMerged && kScores == 2>(lists, 3, keeps_smaller(n_steps, 1));
    if constexpr (kScores == 1) exchange<kScores, false>(lists, 6, keeps_smaller(n_steps, 0));
#pragma unroll
    for (int distance = kScores / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if ((i & distance) == 0) put_larger_first(lists[i], lists[i + distance]);
    }
  }
  // where each lane has one score already
  template <class Pair>
  __device__ __forceinline__ void merge_whole(Pair* lists, int offset, int n_steps) const {
    lists[0] = __hmax2(lists[0], other_of(lists[0], offset));
    sort<1, true>(lists, n_steps);
  }
  // Both halves get the same list; before it is sorted, the upper one has it in the opposite order.
  template <int kScores, class Pair>
  __device__ __forceinline__ Pair last_of_halves(const Pair* lists, int n_steps) const {
    Pair best[kScores];
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const Pair reversed = __lowhigh2highlow(lists[kScores - 1 - i]);
      best[i] = __hmax2(lists[i], kScores == 8 ? reversed : other_of(reversed, 4 / kScores));
    }
    sort<kScores, false>(best, n_steps);
    Pair last = best[0];
#pragma unroll
    for (int i = 1; i < kScores; ++i)
      if (i <= (last_ & (kScores - 1))) last = best[i];
    return __shfl_sync(kWholeWarp, last, lanes_.lane_of_warp(last_lane_));
  }

  const LaneGroup& lanes_;
  unsigned smaller_;
  int last_, last_lane_;  // k - 1, and the lane that has it
};

}  // namespace ava
