// A router's row in the registers of 1 to 32 lanes, for up to 512 experts of 16 or 32 bits. A warp takes 32 / n_lanes
// rows at once, so that few experts do not mean idle lanes.
#pragma once
#include "router_rows_fetch.cuh"
#include "softmax_rows_exponent.cuh"

namespace ava {

constexpr int64_t kMostExpertsOfLanes = 512;

// A nan loses.
template <class Element, int kVectors>
__device__ __forceinline__ float largest_of(const uint4* bits) {  // [kVectors] of 16-bit elements
  ElementPair<Element> pairs[4 * kVectors];
  memcpy(static_cast<void*>(pairs), bits, 16 * kVectors);
#pragma unroll
  for (int n = 2 * kVectors; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) pairs[i] = __hmax2(pairs[i], pairs[i + n]);
  }
  return fmaxf(to_float(pairs[0].x), to_float(pairs[0].y));
}

// Ordinary rows of 16 bits are done with fewer instructions; the others as those of 32 bits and of sigmoids.
template <class Element, bool kSigmoid>
constexpr bool kMayBeOrdinary = sizeof(Element) == 2 && !kSigmoid;

template <class Element, int kItems, bool kSigmoid>
class RouterLanes : public RouterRowsInFlight<Element, kItems, kMayBeOrdinary<Element, kSigmoid>> {
 public:
  static constexpr bool kQuick = kMayBeOrdinary<Element, kSigmoid>;
  using Rows = RouterRowsInFlight<Element, kItems, kQuick>;
  using Rows::expert_at, Rows::is_padded, Rows::kept, Rows::kSize, Rows::kVectors, Rows::read_bits, Rows::row_of_all;
  using typename Rows::Turn;
  static constexpr int kMostSurplus = 3;  // more equal scores cost as much as choosing one after the other
  static constexpr float kLargestOrdinary = 32, kLeastOrdinaryRest = 1.f / 128;  // is_ordinary

  __device__ RouterLanes(const RouterArguments<float>& arguments, int n_lanes, unsigned char* rows)
      : Rows(arguments, n_lanes, rows), n_bytes_(int(bytes_of_choice(arguments.n_experts))) {
    const int64_t first_choice = row_of_all(0) * arguments.k, first_byte = row_of_all(0) * n_bytes_;
    if (arguments.new_choice) new_choice_ = kept(arguments.new_choice + first_byte);
    if (arguments.choice) choice_ = kept(arguments.choice + first_byte);
    if (arguments.indices) given_ = kept(arguments.indices + first_choice);
    if (arguments.wide_indices) given_ = kept(arguments.wide_indices + first_choice);
  }

  // The row's logits, in the body, as often as they are wanted: cheaper than registers that keep them.
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
  // would lose more digits than 16 bits have to spare, nor has it a logit of nan or -inf: sum z e^z would be nan. It is
  // done without its maximum. Of the row's sum e^z and its log2, of this lane's part of sum z e^z and its largest e^z.
  __device__ static bool is_ordinary(float total, float log_total, float weighted, float largest) {
    return total >= (1 + kLeastOrdinaryRest) * largest && fabsf(log_total) <= kLargestOrdinary && weighted == weighted;
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

  // The k best of `scores`, -inf behind the last expert.
  template <class Key>
  __device__ ChosenItems choose(const float* scores) const {
    uint32_t ranks[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) ranks[i] = uint32_t(rank_of(scores[i])) ^ 0x80000000u;
    // keys of 64 bits do not stay in registers, of which there are too few
    const auto key = [&](int i) {
      return choice_key<Key>(sizeof(Key) == 4 ? ranks[i] : computed_again(ranks[i]), expert_at(i));
    };
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
      chosen.add(place_of(expert_of_key(last)) - 32 * lanes_.own);
    }
    return chosen;
  }
  // The same for at most kBest choices among scores of 16 bits, found by the score of the last one. False, for the whole
  // warp, where a row of it has a nan or too many scores that equal the last one.
  __device__ bool choose_best(const Turn& turn, const LastChoice& last_choice, bool has_nan,
                              ChosenItems& chosen) const {
    static_assert(kItems == 2 * kBest, "two lists in a lane");
    uint4 bits[kVectors];
    read_bits(turn, bits);
    ElementPair<Element> scores[kBest], best[kBest];
    memcpy(static_cast<void*>(scores), bits, sizeof(scores));
    if (is_padded()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (expert_at(i) >= n_experts_) (i % 2 ? scores[i / 2].y : scores[i / 2].x) = from_float<Element>(-INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kBest; ++i) best[i] = scores[i];
    sort_best(best);
    const ElementPair<Element> last = last_choice.of(best);
    chosen = {};
#pragma unroll
    for (int i = 0; i < kBest; ++i) chosen.bits |= __hge2_mask(scores[i], last) & 0x10001u << 2 * i;
    // more than k where others equal the last one
    int n_surplus = lanes_.sum(__popc(chosen.bits)) - int(a_.k);
    if (!turn.counts()) n_surplus = 0;
    if (!__any_sync(kWholeWarp, has_nan || n_surplus > 0)) return true;
    if (__any_sync(kWholeWarp, has_nan || n_surplus > kMostSurplus)) return false;
    ChosenItems equal;
#pragma unroll
    for (int i = 0; i < kBest; ++i) equal.bits |= __heq2_mask(scores[i], last) & 0x10001u << 2 * i;
#pragma unroll 1
    for (; __any_sync(kWholeWarp, n_surplus > 0); --n_surplus) {  // the last expert of them goes
      const int item = 31 - __clz(int(equal.in_order()));
      const int expert = n_surplus > 0 && item >= 0 ? expert_at(item) : -1;
      const int last_expert = lanes_.largest(expert);
      if (expert < 0 || expert != last_expert) continue;
      equal.remove(item);
      chosen.remove(item);
    }
    return true;
  }

  // The row's own choices are kept as router_rows.h says: a byte for 8 neighbouring experts, of two lanes with 4 of 32 bits.
  __device__ void store_choice(const Turn& turn, const ChosenItems& chosen) const {
    const unsigned items = turn.counts() ? chosen.in_order() : 0;
    uint8_t* const bytes = new_choice_ + uint64_t(turn.row()) * unsigned(n_bytes_);
    if (kSize == 4 && lanes_.n > 1) {
      const unsigned others = __shfl_xor_sync(kWholeWarp, items, 1);
      if (!turn.has_row() || lanes_.own % 2 != 0) return;
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
        const int byte = expert_at(vector * kSize) / 8;
        if (byte < n_bytes_)
          bytes[byte] = uint8_t((items >> vector * kSize & 15) | (others >> vector * kSize & 15) << 4);
      }
    } else if (turn.has_row()) {
#pragma unroll
      for (int item = 0; item < kItems; item += 8)
        if (expert_at(item) / 8 < n_bytes_) bytes[expert_at(item) / 8] = uint8_t(items >> item);
    }
  }
  __device__ ChosenItems load_choice(const Turn& turn) const {
    const uint8_t* const bytes = choice_ + uint64_t(turn.row()) * unsigned(n_bytes_);
    unsigned items = 0;
    if (!turn.counts()) return {};
#pragma unroll
    for (int item = 0; item < kItems; item += kSize) {
      const int expert = expert_at(item);
      if (expert < n_experts_) items |= (bytes[expert / 8] >> expert % 8 & ((1u << kSize) - 1)) << item;
    }
    return ChosenItems::from_order(items);
  }
  // use(chosen) for the row's choices that were given; one at a time where a row chose an expert twice.
  // False where there is no such expert.
  template <class Use>
  __device__ bool for_given(const Turn& turn, Use use) const {
    const int k = int(a_.k);
    const uint64_t at = uint64_t(turn.row()) * unsigned(k) + unsigned(lanes_.own);
    bool every_expert_exists = true;
    // each(the bit of an item of this lane, or beyond) for every choice; each lane reads one of them at a time
    const auto for_each = [&](auto n_at_once, auto each) {
#pragma unroll 1
      for (int first = 0; first < k; first += lanes_.n) {
        int own = -1;  // in no lane
        if (turn.counts() && first + lanes_.own < k) {
          const int64_t expert = a_.wide_indices ? static_cast<const int64_t*>(given_)[at + unsigned(first)]
                                                 : static_cast<const int32_t*>(given_)[at + unsigned(first)];
          every_expert_exists = every_expert_exists && expert >= 0 && expert < a_.n_experts;
          own = place_of(int(expert));
        }
        const int n = k - first < lanes_.n ? k - first : lanes_.n;
#pragma unroll 1
        for (int which = 0; which < n; which += decltype(n_at_once)::value) {
#pragma unroll
          for (int i = 0; i < decltype(n_at_once)::value; ++i) each(lanes_.broadcast(own, which + i) - 32 * lanes_.own);
        }
      }
    };
    ChosenItems all;
    const auto add = [&](int bit) { all.add(bit); };
    if (lanes_.n >= 4)
      for_each(std::integral_constant<int, 4>(), add);
    else
      for_each(std::integral_constant<int, 1>(), add);
    if (!__any_sync(kWholeWarp, all.repeated != 0)) {
      use(all);
    } else {
      for_each(std::integral_constant<int, 1>(), [&](int bit) {
        ChosenItems one;
        one.add(bit);
        use(one);
      });
    }
    return every_expert_exists;
  }

 private:
  // The bit of an expert's item among those of the row's lanes, 32 for each.
  __device__ int place_of(int expert) const {
    const unsigned vector = unsigned(expert) / kSize;
    const unsigned lane = vector & (lanes_.n - 1), of_lane = vector >> lanes_.n_bits;
    return int(lane * 32) + ChosenItems::bit_of(int(of_lane * kSize + unsigned(expert) % kSize));
  }

  using Rows::a_, Rows::lanes_, Rows::n_experts_;
  const int n_bytes_;              // of a row's own choices
  uint8_t* new_choice_ = nullptr;  // of the layer
  const uint8_t* choice_ = nullptr;
  const void* given_ = nullptr;  // of the layer, 64 or 32 bits
};

}  // namespace ava
