// What the lanes of a router's row do together: sums and maxima over them, and the choice of experts.
#pragma once
#include "router_rows_arguments.cuh"

namespace ava {

// The lanes of a warp that share a row: a power of two of neighbours. Shuffles are unrolled, whatever their number: a
// step over lanes that belong to other rows shuffles with itself instead, which leaves a maximum as it is and doubles a
// sum; `once` takes that back, exactly.
struct LaneGroup {
  int n, n_bits, own;              // n = 2^n_bits
  int offset16, offset2, offset1;  // 0: a step with itself
  float once;

  __device__ explicit LaneGroup(int n_lanes)
      : n(n_lanes),
        own(int(threadIdx.x) & (n_lanes - 1)),
        offset16(n_lanes > 16 ? 16 : 0),
        offset2(n_lanes > 2 ? 2 : 0),
        offset1(n_lanes > 1 ? 1 : 0),
        once(n_lanes == 16 ? 0.5f
             : n_lanes < 4 ? float(n_lanes) / 4
                           : 1.f) {
    n_bits = __ffs(n_lanes) - 1;  // not above: nvcc's pass over the host's code looks at what stands there
  }

  // step(value, offset) for every offset of a butterfly
  template <class Value, class Step>
  __device__ __forceinline__ Value butterfly(Value value, Step step) const {
    if (n > 4) {
      if (n > 8) value = step(step(value, offset16), 8);
      value = step(value, 4);
    }
    return step(step(value, offset2), offset1);
  }
  __device__ __forceinline__ float sum(float value) const {
    return once *
           butterfly(value, [](float sum, int offset) { return sum + __shfl_xor_sync(kWholeWarp, sum, offset); });
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
__device__ Key choice_key(float score, int expert) {
  const uint32_t rank = uint32_t(rank_of(score)) ^ 0x80000000u;
  return Key(rank >> kUnusedRankBits<Key>) << kExpertBits | Key((1 << kExpertBits) - 1 - expert);
}
template <class Key>
__device__ int expert_of_key(Key key) {
  return (1 << kExpertBits) - 1 - int(key & ((1 << kExpertBits) - 1));
}

// The same for scores of 16 bits, signed, which takes fewer instructions: the float's own bits in the order of integers.
__device__ __forceinline__ int signed_choice_key(float score, int expert) {
  constexpr int kRankBits = INT32_MAX ^ ((1 << kExpertBits) - 1);
  int bits = __float_as_int(score + 0.f);  // -0 is 0
  if (score != score) bits = kRankBits;
  return (bits ^ (bits >> 31 & kRankBits)) + ((1 << kExpertBits) - 1 - expert);
}

// The largest keys that a lane holds, largest first. They are found for all choices at once, by networks of comparisons:
// in the lane, then of both lanes of a pair until all lanes of the row have the same.
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

}  // namespace ava
