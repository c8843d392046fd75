// Which rows the threads of a block take, and how their logits come: 16 bytes at a time where they are aligned, three
// rows ahead.
#pragma once
#include "router_rows_choice.cuh"

namespace ava {

constexpr int kRowsAhead = 3, kRowStages = kRowsAhead + 1;  // copies under way hide the memory's latency

// Blocks that a multiprocessor has registers for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kRouterBlocks = 1;  // two would spill there
#else
constexpr int kRouterBlocks = 2;
#endif

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
// by more of them. kIsQuick: there are quick ways for rows without -inf; what stands behind the last expert is finite.
template <class Element, int kItems, bool kIsQuick>
class RouterRowsInFlight {
 public:
  static constexpr int kSize = kVectorSize<Element>, kVectors = kItems / kSize;
  static constexpr int kNoRow = INT32_MAX;

  // rows: router_row_bytes of shared memory
  __device__ RouterRowsInFlight(const RouterArguments<float>& arguments, int n_lanes, unsigned char* rows)
      : a_(arguments),
        lanes_(n_lanes),
        n_experts_(int(arguments.n_experts)),
        layer_(arguments.first_layer + blockIdx.y),
        slots_(shared_computed_once(reinterpret_cast<uint4*>(rows) + threadIdx.x)) {
    const RouterSlot slot = arguments.rows_of_slot(blockIdx.x);
    segment_ = int(slot.segment);
    begin_ = unsigned(slot.begin);
    end_ = unsigned(slot.end);
    flip_ = kept(slot.segment < arguments.n_segments ? 0 : -1);
    is_plain_ = kept(!arguments.order && !arguments.row_mask);
    const RowLayout& layout = arguments.layout;
    const int64_t row_bytes = layout.n_dims ? layout.strides[0] * int64_t(sizeof(Element)) : 0;
    own_logits_ = kept(static_cast<const unsigned char*>(arguments.logits[blockIdx.y]) + lanes_.own * 16);
    const bool is_regular = layout.n_dims <= 1 && row_bytes % 16 == 0 && row_bytes >= 0 && row_bytes <= INT32_MAX &&
                            reinterpret_cast<uintptr_t>(own_logits_) % 16 == 0 && n_experts_ % kSize == 0;
    row_bytes_ = is_regular && expert_at(kItems - 1) < n_experts_ ? int(row_bytes) : -1;
  }

  // Computed once for all turns, where there are registers to spare.
  template <class Value>
  __device__ static Value kept(Value value) {
    if constexpr (kIsQuick) return computed_once(value);
    return value;
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
      body(Turn{turn, kIsQuick ? rows[0] : code_of(place - kRowsAhead * step), slot_of(turn)});
    }
  }
  __device__ bool is_padded() const { return n_experts_ < lanes_.n * kItems; }  // more items than experts
  // The row's logits, in the body, as often as they are wanted: cheaper than registers that keep them.
  __device__ static void read_bits(const Turn& turn, uint4* bits) {
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) bits[vector] = turn.slot[vector * kRouterThreads];
  }

 private:
  static constexpr float kPadding = !kIsQuick                              ? -INFINITY
                                    : std::is_same<Element, __half>::value ? -65504.f
                                                                           : -0x1.fep127f;

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
    const Element* const z = reinterpret_cast<const Element*>(own_logits_ - lanes_.own * 16) +
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

 protected:
  const RouterArguments<float>& a_;
  const LaneGroup lanes_;
  const int n_experts_;
  const int64_t layer_;
  uint4* const slots_;  // this thread's, one in kRouterThreads
  int segment_;
  unsigned begin_, end_;             // the slot's rows
  int flip_;                         // -1 if they are in no group, else 0
  int is_plain_;                     // rows are at their places, and all count
  const unsigned char* own_logits_;  // of the layer, from this lane's first vector on
  int row_bytes_;                    // between rows whose vectors are whole and aligned; else -1
};

}  // namespace ava
