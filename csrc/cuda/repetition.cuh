// Repetition candidates on the device, by reading: what they are is in ../repetition.h.
//
// One warp per row, which reads the row's context backwards, 32 tokens at a time, until every slot is decided: the run
// that ends the context, the counted rows before, the followers of the row's key. Most recent first is the order in
// which they are met, so there is nothing to sort; a follower that is in a slot already is left out. No hashes, so
// nothing to verify: every match compares the tokens themselves, the key's last one first, which the next lane has
// already; penalties are looked up for followers that are new. A run is read until its weight grows no more. A row whose
// n-gram slots stay open reads its whole window: time grows with length times window. So this is for few tokens; where
// rows would read too many, repetition_order.cuh finds the same in linear time, and this is what it falls back on.
#pragma once
#include <cmath>

#include "repetition_arguments.cuh"

namespace ava {

constexpr int kRepetitionWarps = 8, kRepetitionRowsPerBlock = 32;

// One row, as the lanes of a warp see it.
template <class Weight>
class RowCandidates {
 public:
  __device__ RowCandidates(const RepetitionArguments<Weight>& arguments, int64_t sequence, int64_t row)
      : a_(arguments),
        sequence_(sequence),
        row_(row),
        end_(row + arguments.tokens_include_row),
        lane_(threadIdx.x % 32),
        target_(arguments.targets.at(sequence, row)),
        segment_(arguments.segments.data ? arguments.segments.at(sequence, row) : 0) {
    const int64_t first_slot = (sequence * a_.n_tokens + row) * a_.n_slots();
    ids_ = a_.ids + first_slot;
    weights_ = a_.candidate_weights + first_slot;
  }

  // Every lane of the warp calls it.
  __device__ void write() {
    const int64_t first = a_.reads_runs ? 0 : a_.first_ngram_slot();
    if (target_ == a_.ignore_index) return put_absent(first, a_.n_slots());
    read_context();
    if (a_.reads_runs) {
      if (a_.use_immediate_repetition_penalty) put_immediate();
      put_eos();
    }
    if (a_.ngram_size > 0) put_absent(a_.first_ngram_slot() + n_found_, a_.n_slots());
  }

 private:
  __device__ void put(int64_t slot, int64_t id, double value) {
    ids_[slot] = int32_t(id);
    weights_[slot] = Weight(value);
  }
  __device__ void put_absent(int64_t first, int64_t last) {
#pragma unroll 1
    for (int64_t slot = first + lane_; slot < last; slot += 32) put(slot, -1, 0);
  }

  // of the row's segment, if every position from here to the row is
  __device__ bool in_segment(int64_t position) const {
    return position >= 0 && (!a_.segments.data || a_.segments.at(sequence_, position) == segment_);
  }

  // whether the context ends with a whole key, none of it masked
  __device__ bool has_key() const {
    bool whole = true;
#pragma unroll 1
    for (int64_t k = lane_; k < a_.ngram_size - 1; k += 32) {
      const int64_t position = end_ - 1 - k;
      whole = whole && in_segment(position) && a_.tokens.at(sequence_, position) != a_.ignore_index;
    }
    return __all_sync(kWholeWarp, whole);
  }
  // whether the token here follows the last token of the row's key: that of the next lane, but for the last lane's
  __device__ bool follows_last(int64_t position, int64_t token, bool inside) const {
    if (a_.ngram_size < 2) return inside;
    int64_t before = __shfl_down_sync(kWholeWarp, token, 1);
    if (lane_ == 31 && inside)
      before = in_segment(position - 1) ? a_.tokens.at(sequence_, position - 1) : a_.ignore_index;
    return inside && before == last_;
  }
  // whether the token here follows the row's key
  __device__ bool follows_key(int64_t position) const {
#pragma unroll 1
    for (int64_t k = 1; k < a_.ngram_size; ++k)
      if (!in_segment(position - k) || a_.tokens.at(sequence_, position - k) != a_.tokens.at(sequence_, end_ - k))
        return false;
    return true;
  }

  // whether a longer run has this run's weight, bit by bit: a text of one token ends here
  __device__ bool run_weight_stays() const {
    const double growth = a_.weight(1), factor = power(growth, run_ - 1);
    return run_ >= a_.immediate_repetition_threshold &&
           (growth == 1 || (growth > 1 && factor >= kMostRunFactor) || (growth >= 0 && factor == 0));
  }

  __device__ void read_context() {
    last_ = in_segment(end_ - 1) ? a_.tokens.at(sequence_, end_ - 1) : a_.ignore_index;
    bool run_is_open = a_.reads_runs && a_.use_immediate_repetition_penalty && last_ != a_.ignore_index;
    const bool may_be_early = a_.reads_runs && a_.n_eos > 0 && a_.min_sequence_length > 0 && !a_.is_eos(target_);
    bool count_is_open = may_be_early;
    bool slots_are_open = a_.ngram_size > 0 && has_key();
    const int64_t oldest = a_.ngram_window_size > 0 ? end_ - a_.ngram_window_size : 0;

    for (int64_t newest = end_ - 1; newest >= 0 && (run_is_open || count_is_open || slots_are_open); newest -= 32) {
      const int64_t position = newest - lane_;
      const unsigned outside = __ballot_sync(kWholeWarp, !in_segment(position));
      const int n_inside = outside ? __ffs(int(outside)) - 1 : 32;
      const bool inside = lane_ < n_inside;
      const int64_t token = inside ? a_.tokens.at(sequence_, position) : a_.ignore_index;
      if (run_is_open) {
        const unsigned differs = __ballot_sync(kWholeWarp, !inside || token != last_);
        run_ += differs ? __ffs(int(differs)) - 1 : 32;
        run_is_open = differs == 0 && !run_weight_stays();
      }
      if (count_is_open) {
        const bool counts = inside && position < row_ && a_.targets.at(sequence_, position) != a_.ignore_index;
        n_counted_ += __popc(__ballot_sync(kWholeWarp, counts));
        count_is_open = n_counted_ < a_.min_sequence_length;
      }
      if (slots_are_open) {
        const bool follows = follows_last(position, token, inside);  // every lane shuffles
        take_followers(position, token, follows && position >= oldest && token != target_);
        slots_are_open = n_found_ < a_.ngram_slots && newest - 32 >= oldest;
      }
      if (n_inside < 32) break;
    }
    is_early_ = may_be_early && n_counted_ < a_.min_sequence_length;
  }

  // Fills slots with the distinct followers among the lanes' that are in none yet; lane 0 has the most recent one. What
  // takes long to tell is asked of those alone that may be new.
  __device__ void take_followers(int64_t position, int64_t token, bool is_new) {
    if (!__any_sync(kWholeWarp, is_new)) return;
    int32_t* const found = ids_ + a_.first_ngram_slot();
    for (int64_t slot = 0; slot < n_found_; ++slot) is_new = is_new && token != found[slot];
    is_new = is_new && a_.may_penalize(token) && follows_key(position);
    unsigned lanes = __ballot_sync(kWholeWarp, is_new);
    for (; lanes != 0 && n_found_ < a_.ngram_slots; lanes = __ballot_sync(kWholeWarp, is_new)) {
      const int32_t newest = __shfl_sync(kWholeWarp, int32_t(token), __ffs(int(lanes)) - 1);
      if (lane_ == 0) put(a_.first_ngram_slot() + n_found_, newest, a_.weight(3));
      is_new = is_new && token != newest;
      ++n_found_;
    }
    __syncwarp();  // the other lanes read lane 0's slots
  }

  __device__ void put_immediate() {
    if (lane_ != 0) return;
    if (run_ >= a_.immediate_repetition_threshold && run_ > 0 && last_ != target_ && a_.may_penalize(last_))
      put(0, last_, a_.weight(0) * fmin(power(a_.weight(1), run_ - 1), kMostRunFactor));
    else
      put(0, -1, 0);
  }
  __device__ void put_eos() {
#pragma unroll 1
    for (int64_t i = lane_; i < a_.n_eos; i += 32) {
      if (is_early_)
        put(a_.use_immediate_repetition_penalty + i, a_.eos_ids[i], a_.weight(2));
      else
        put(a_.use_immediate_repetition_penalty + i, -1, 0);
    }
  }

  const RepetitionArguments<Weight>& a_;
  int64_t sequence_, row_;
  int64_t end_;  // of the context
  int lane_;
  int64_t target_, segment_;
  int32_t* ids_;     // [n_slots]
  Weight* weights_;  // [n_slots]

  int64_t last_ = 0;  // token of the context, or ignore_index
  int64_t run_ = 0, n_counted_ = 0, n_found_ = 0;
  bool is_early_ = false;
};

template <class Weight>
__global__ void __launch_bounds__(32 * kRepetitionWarps, 4)
    repetition_kernel(const RepetitionArguments<Weight> arguments) {
  if (arguments.collisions) {
    bool has_one = false;
    for (int64_t i = threadIdx.x % 32; i < arguments.n_collisions; i += 32) has_one |= arguments.collisions[i] != 0;
    if (!__any_sync(kWholeWarp, has_one)) return;
  }
  const int64_t n_tiles = (arguments.n_tokens + kRepetitionRowsPerBlock - 1) / kRepetitionRowsPerBlock;
  const int64_t sequence = blockIdx.x / n_tiles, first = blockIdx.x % n_tiles * kRepetitionRowsPerBlock;
  for (int64_t i = threadIdx.x / 32; i < kRepetitionRowsPerBlock && first + i < arguments.n_tokens;
       i += kRepetitionWarps)
    RowCandidates<Weight>(arguments, sequence, first + i).write();
}

template <class Weight>
void write_candidates(const RepetitionArguments<Weight>& arguments, Stream stream) {
  const int64_t n_tiles = (arguments.n_tokens + kRepetitionRowsPerBlock - 1) / kRepetitionRowsPerBlock;
  const int64_t n_blocks = arguments.n_sequences * n_tiles;
  if (n_blocks == 0 || arguments.n_slots() == 0) return;
  launch("repetition_candidates", repetition_kernel<Weight>, {dim3(unsigned(n_blocks)), dim3(32 * kRepetitionWarps)},
         stream, arguments);
}

}  // namespace ava
