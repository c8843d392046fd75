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
  // of the group's lane of this number
  __device__ __forceinline__ int broadcast(int value, int lane) const {
    return __shfl_sync(kWholeWarp, value, int(threadIdx.x) % 32 - own + lane);
  }
};

// Which items of a lane were chosen: item i is bit 2 i.
struct ChosenItems {
  uint32_t bits = 0, repeated = 0;  // repeated: those that were chosen before

  // twice the item of this lane, or any other number
  __device__ void add(int twice_item) {
    const uint32_t bit = bit_at(unsigned(twice_item));
    repeated |= bits & bit;
    bits |= bit;
  }
  __device__ bool has(int item) const { return bits >> 2 * item & 1; }
};

// How often they were, 8 bits for each: a thread has 16 rows of a slot at most.
constexpr int kMostGivenChoices = 15;
struct ChoiceCounts {
  uint32_t words[4] = {};  // item 4 m + j is byte m of word j

  __device__ void add(const ChosenItems& chosen) {
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] += chosen.bits >> 2 * j & 0x01010101u;
  }
  __device__ void add(int item) { words[item % 4] += 1u << item / 4 * 8; }
  __device__ int of(int item) const { return int(words[item % 4] >> item / 4 * 8 & 255); }
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

// The same for two neighbouring scores of 16 bits, signed: score and expert take half of a key each.
template <class Element>
__device__ __forceinline__ void pair_of_keys(uint32_t scores, int expert, int* keys) {  // keys: [2]
  ElementPair<Element> pair;
  memcpy(static_cast<void*>(&pair), &scores, 4);
  pair = __hadd2(pair, ElementPair<Element>{});  // -0 becomes 0, and every nan the largest of all numbers
  memcpy(&scores, &pair, 4);
  scores ^= sign_masks(scores) & 0x7fff7fffu;  // in the order of integers
  const uint32_t places = uint32_t((1 << kExpertBits) - 1 - expert) * 0x10001u - 0x10000u;
  keys[0] = int(__byte_perm(places, scores, 0x5410));
  keys[1] = int(__byte_perm(places, scores, 0x7632));
}

// The largest keys that a lane holds, largest first. They are found for all choices at once, by networks of comparisons:
// in the lane, then of both lanes of a pair, then of pairs, until it is those of the row (BestOfLanes).
constexpr int kBest = 8, kLeastBest = 3;  // for fewer choices one after the other is cheaper

__device__ __forceinline__ void put_larger_first(int& x, int& y) {
  const int larger = max(x, y);
  y = min(x, y);
  x = larger;
}
__device__ __forceinline__ void sort_best(int* keys) {  // [kBest]
  constexpr int kPairs[][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                               {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (int i = 0; i < 19; ++i) put_larger_first(keys[kPairs[i][0]], keys[kPairs[i][1]]);
}
// `keys` become the best of both, sorted as they were.
template <class OtherOf>
__device__ __forceinline__ void merge_best(int* keys, OtherOf other_of) {  // [kBest]
  int both[kBest];
#pragma unroll
  for (int i = 0; i < kBest; ++i) both[i] = max(keys[i], other_of(kBest - 1 - i));  // they rise, then fall
#pragma unroll
  for (int distance = kBest / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kBest; ++i)
      if ((i & distance) == 0) put_larger_first(both[i], both[i + distance]);
  }
#pragma unroll
  for (int i = 0; i < kBest; ++i) keys[i] = both[i];
}

// The best keys of lists that lanes share: of a lane, of two, of four and so on. Of two lists a and b of 8 keys each, c_i =
// max(a_i, b_{7 - i}) are the best; they rise and fall, so that comparisons at distances 4, 2, 1 sort them. Both lanes that
// compare would do the same: so each keeps half of the list, then half of that, until it has one key of the list.
//
// Lanes that compare have to know the key's place in the list, whose bits are 4 L2 + 2 L1 + L0. With each merge one more of
// these bits is told by the lane: a list of 2^s lanes, s <= 3, has s of them, the others are the number of the key in the
// lane. The lane of the list b keeps the places 7 - i where that of a keeps i, which turns every bit. So the bits of a place
// are parities of the lane's bits l0, l1, ...: L2 = l0 ^ ... ^ l_{s-1}, L1 = l1 ^ ... ^ l_{s-1}, L0 = l2 ^ ... ^ l_{s-1}; and
// only L2 is another one in lane l ^ 1, L1 in l ^ 3, L0 in l ^ 6.
class BestOfLanes {
 public:
  // k: of the choices, the last of which is asked for
  __device__ BestOfLanes(const LaneGroup& lanes, int k) : lanes_(lanes) {
    unsigned smaller = 0;
#pragma unroll
    for (int n_steps = 1; n_steps <= 5; ++n_steps) {
#pragma unroll
      for (int bit = 0; bit < 3; ++bit)
        smaller |= unsigned(__popc(unsigned(lanes.own) % (1u << n_steps) >> (2 - bit)) & 1) << (3 * n_steps + bit);
    }
    const int n_bits = lanes.n_bits < 3 ? lanes.n_bits : 3;  // of a place that the lane tells
    place_ = int(smaller >> 3 * lanes.n_bits & 7) & (8 - (8 >> n_bits));
    // the bits of a lane from those of a place: l0 = L2 ^ L1, ...
    const unsigned last = unsigned(k - 1) >> (3 - n_bits);
    last_lane_ = computed_once(n_bits ? int(__brev(last ^ last << 1) >> (32 - n_bits)) : 0);
    smaller_ = unsigned(computed_once(int(smaller)));
    place_ = computed_once(place_);
  }
  // of a list's last key, where it has k
  __device__ int last_lane() const { return last_lane_; }

  // finish(std::integral_constant<int, n>(), keys, place): n keys of this lane, the first of which has this place
  template <class Finish>
  __device__ __forceinline__ auto merge(int* keys, Finish finish) const {  // keys: [kBest] of this lane, sorted
    if (lanes_.n == 1) return finish(std::integral_constant<int, 8>(), keys, place_);
    halve<8>(keys, 1);
    exchange<4, true>(keys, 1, keeps_smaller(1, 2));
    put_larger_first(keys[0], keys[2]);
    put_larger_first(keys[1], keys[3]);
    put_larger_first(keys[0], keys[1]);
    put_larger_first(keys[2], keys[3]);
    if (lanes_.n == 2) return finish(std::integral_constant<int, 4>(), keys, place_);
    halve<4>(keys, 3);
    exchange<2, false>(keys, 1, keeps_smaller(2, 2));
    exchange<2, true>(keys, 3, keeps_smaller(2, 1));
    put_larger_first(keys[0], keys[1]);
    if (lanes_.n == 4) return finish(std::integral_constant<int, 2>(), keys, place_);
    halve<2>(keys, 6);
    sort_over_lanes(keys, 3);
    if (lanes_.n > 8) {
      keys[0] = max(keys[0], __shfl_xor_sync(kWholeWarp, keys[0], 12));
      sort_over_lanes(keys, 4);
      if (lanes_.n > 16) {
        keys[0] = max(keys[0], __shfl_xor_sync(kWholeWarp, keys[0], 20));
        sort_over_lanes(keys, 5);
      }
    }
    return finish(std::integral_constant<int, 1>(), keys, place_);
  }

 private:
  // Whether this bit of a place in this lane is 1, in lists of 2^n_steps lanes.
  __device__ bool keeps_smaller(int n_steps, int bit) const { return smaller_ >> (3 * n_steps + bit) & 1; }
  // The larger ones of this list and the other.
  template <int kKeys>
  __device__ __forceinline__ static void halve(int* keys, int offset) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i)
      keys[i] = max(keys[i], __shfl_xor_sync(kWholeWarp, keys[kKeys - 1 - i], offset));
  }
  // kReversed: the other lane has the places in the opposite order
  template <int kKeys, bool kReversed>
  __device__ __forceinline__ static void exchange(int* keys, int offset, bool keeps_smaller) {
    int others[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      others[i] = __shfl_xor_sync(kWholeWarp, keys[kReversed ? kKeys - 1 - i : i], offset);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = keeps_smaller ? min(keys[i], others[i]) : max(keys[i], others[i]);
  }
  __device__ __forceinline__ void sort_over_lanes(int* key, int n_steps) const {
    exchange<1, false>(key, 1, keeps_smaller(n_steps, 2));
    exchange<1, false>(key, 3, keeps_smaller(n_steps, 1));
    exchange<1, false>(key, 6, keeps_smaller(n_steps, 0));
  }

  const LaneGroup& lanes_;
  unsigned smaller_;
  int place_, last_lane_;
};

}  // namespace ava
