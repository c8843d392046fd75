// The n-gram slots of all rows in linear time, whatever the text.
//
// Rows are sorted by a hash of their key, the tokens that end their context, so that the rows of a key lie one behind the
// other, oldest first: a group. What follows a row's key in the text is its follower. A row's candidates are the distinct
// followers before it in its group, most recent first: a list to whose front each row's follower moves as one goes on.
// A list of ngram_slots + 1 (one of them may be the row's own target) forgets nothing that is wanted, and the lists of
// two stretches of a group make that of both. So the sorted rows are cut into chunks: lists of all chunks first, then
// lists of spans of chunks, and then each chunk begins with the lists before it and goes on row by row. One warp for
// each; a lane holds one entry.
//
// The hash has 62 bits. Every row is compared with the one before it in its group, token by token: where two keys share a
// hash, repetition_kernel writes the slots again by reading, which is as exact and only slow.
#pragma once
#include "repetition_text.cuh"

namespace ava {

constexpr int kMostSlotsByOrder = 31;              // one less than lanes
constexpr int kChunkRows = 128, kSpanChunks = 64;  // of a chunk, of a span
constexpr int kOrderWarps = 4;                     // of a block
constexpr int64_t kNoKey = INT64_MAX;              // hash of rows that have none: behind all others

struct RowOrder {
  int64_t n_rows;               // n_sequences * n_tokens
  uint64_t hash_bits;           // those of a hash that are used: all, but in tests
  int64_t* hashes;              // [n_rows], then
  const int64_t* sorted;        // [n_rows]: the hashes in order
  const int64_t* rows;          // [n_rows]: which row each of them belongs to; equal ones as they were
  int32_t *tokens, *positions;  // [n_chunks + n_spans, 32]: lists
  int32_t* lengths;     // [n_chunks + n_spans]: of the lists; negative, -1 - length, where no list before matters
  int32_t* collisions;  // [n_chunks + n_spans]: whether two keys share a hash

  __host__ __device__ int64_t n_chunks() const { return (n_rows + kChunkRows - 1) / kChunkRows; }
  __host__ __device__ int64_t n_spans() const { return (n_chunks() + kSpanChunks - 1) / kSpanChunks; }
};

// Keys and followers, by the number of a row among all.
template <class Weight>
class Keys {
 public:
  __device__ Keys(const RepetitionArguments<Weight>& arguments, const TextFacts& facts)
      : a_(arguments),
        facts_(facts),
        length_(arguments.ngram_size - 1),
        ahead_(arguments.tokens_include_row && length_ > 0) {}

  // With a key of no tokens the row's own token, though it is read, is still the one that follows.
  __device__ bool follows_itself() const { return a_.tokens_include_row && length_ == 0; }
  // Where a row's key ends and its follower stands.
  __device__ int64_t end_of(int64_t row) const { return row % a_.n_tokens + ahead_; }
  // end of the row's context - end of its key
  __device__ int64_t end_of_context() const { return a_.tokens_include_row - int64_t(ahead_); }

  __device__ int64_t hash(int64_t row_of_all, uint64_t bits) const {
    const int64_t sequence = row_of_all / a_.n_tokens, end = end_of(row_of_all), start = facts_.text_start[row_of_all];
    if (end - length_ < start) return kNoKey;
    uint64_t hash = mixed(mixed(0x9e3779b97f4a7c15ull, sequence), start);
#pragma unroll 1
    for (int64_t position = end - length_; position < end; ++position) {
      const int64_t token = a_.tokens.at(sequence, position);
      if (token == a_.ignore_index) return kNoKey;
      hash = mixed(hash, token);
    }
    return int64_t((hash & bits) >> 2);  // below kNoKey
  }
  __device__ bool same(int64_t row, int64_t other) const {
    const int64_t sequence = row / a_.n_tokens;
    if (sequence != other / a_.n_tokens || facts_.text_start[row] != facts_.text_start[other]) return false;
#pragma unroll 1
    for (int64_t k = 1; k <= length_; ++k)
      if (a_.tokens.at(sequence, end_of(row) - k) != a_.tokens.at(sequence, end_of(other) - k)) return false;
    return true;
  }
  // What follows the row's key in its text, if it may be penalised; else -1.
  __device__ int32_t follower(int64_t row) const {
    const int64_t position = end_of(row);
    if (position >= a_.n_tokens || (ahead_ && facts_.text_start[row + 1] != facts_.text_start[row])) return -1;
    const int64_t token = a_.tokens.at(row / a_.n_tokens, position);
    return a_.may_penalize(token) ? int32_t(token) : -1;
  }

 private:
  __device__ static uint64_t mixed(uint64_t hash, int64_t value) {  // the constants of MurmurHash3
    hash = (hash ^ uint64_t(value)) * 0xff51afd7ed558ccdull;
    hash = (hash ^ hash >> 33) * 0xc4ceb9fe1a85ec53ull;
    return hash ^ hash >> 32;
  }

  const RepetitionArguments<Weight>& a_;
  const TextFacts& facts_;
  const int64_t length_;
  const bool ahead_;
};

// Distinct followers, most recent first; lane i holds entry i.
class FollowersOfLanes {
 public:
  __device__ explicit FollowersOfLanes(int64_t n_slots) : most_(int(n_slots) + 1), lane_(int(threadIdx.x) % 32) {}

  __device__ bool is_full() const { return length_ == most_; }
  __device__ void clear() {
    length_ = 0;
    token_ = -1;
  }
  // Those of the lanes that have one, not -1, older than all here; lane 0 has the most recent one.
  __device__ void append(int32_t token, int32_t position) {
#pragma unroll 1
    for (int i = 0; i < length_; ++i)
      if (__shfl_sync(kWholeWarp, token_, i) == token) token = -1;
    unsigned lanes = __ballot_sync(kWholeWarp, token >= 0);
#pragma unroll 1
    for (; lanes != 0 && length_ < most_; lanes = __ballot_sync(kWholeWarp, token >= 0)) {
      const int newest = __ffs(int(lanes)) - 1;
      const int32_t newest_token = __shfl_sync(kWholeWarp, token, newest),
                    newest_position = __shfl_sync(kWholeWarp, position, newest);
      if (lane_ == length_) token_ = newest_token, position_ = newest_position;
      ++length_;
      if (token == newest_token) token = -1;
    }
  }
  // The same token for all lanes.
  __device__ void move_to_front(int32_t token, int32_t position) {
    const unsigned found = __ballot_sync(kWholeWarp, token_ == token);
    if (found == 0 && length_ < most_) ++length_;
    const int last = found ? __ffs(int(found)) - 1 : length_ - 1;  // where it was, or the place that is new or lost
    const int32_t token_before = __shfl_up_sync(kWholeWarp, token_, 1),
                  position_before = __shfl_up_sync(kWholeWarp, position_, 1);
    if (lane_ == 0)
      token_ = token, position_ = position;
    else if (lane_ <= last)
      token_ = token_before, position_ = position_before;
  }

  // begins: the group begins within what the list is of
  __device__ void store(const RowOrder& order, int64_t list, bool begins) const {
    order.tokens[list * 32 + lane_] = token_;
    order.positions[list * 32 + lane_] = position_;
    if (lane_ == 0) order.lengths[list] = begins || is_full() ? -1 - length_ : length_;
  }
  // whether a list before that one could matter still
  __device__ bool append_stored(const RowOrder& order, int64_t list) {
    append(order.tokens[list * 32 + lane_], order.positions[list * 32 + lane_]);
    return order.lengths[list] >= 0 && !is_full();
  }
  // All that are not the target and not older than `oldest`, as far as there are slots.
  template <class Weight>
  __device__ void write(int64_t target, int64_t oldest, int n_slots, Weight weight,
                        int32_t* ids,             // [n_slots]
                        Weight* weights) const {  // [n_slots]
    const bool is_candidate = token_ >= 0 && token_ != target && position_ >= oldest;
    const unsigned candidates = __ballot_sync(kWholeWarp, is_candidate);
    const int slot = __popc(candidates & ((1u << lane_) - 1));
    if (is_candidate && slot < n_slots) ids[slot] = token_, weights[slot] = weight;
    if (lane_ >= __popc(candidates) && lane_ < n_slots) ids[lane_] = -1, weights[lane_] = Weight(0);
  }

 private:
  const int most_, lane_;
  int length_ = 0;
  int32_t token_ = -1, position_ = 0;
};

template <class Weight>
__global__ void __launch_bounds__(256)
    key_hashes_kernel(const RepetitionArguments<Weight> arguments, const TextFacts facts, const RowOrder order) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < order.n_rows) order.hashes[row] = Keys<Weight>(arguments, facts).hash(row, order.hash_bits);
}

__device__ inline bool starts_group(const RowOrder& order, int64_t place) {
  const int64_t hash = order.sorted[place];
  return place == 0 || hash == kNoKey || hash != order.sorted[place - 1];
}

// The list of each chunk: of its last group, as far as that reaches into it.
template <class Weight>
__global__ void __launch_bounds__(32 * kOrderWarps)
    chunk_lists_kernel(const RepetitionArguments<Weight> arguments, const TextFacts facts, const RowOrder order) {
  const int64_t chunk = int64_t(blockIdx.x) * kOrderWarps + threadIdx.x / 32;
  if (chunk >= order.n_chunks()) return;
  const int lane = int(threadIdx.x) % 32;
  const Keys<Weight> keys(arguments, facts);
  const int64_t first = chunk * kChunkRows;
  const int64_t end = first + kChunkRows < order.n_rows ? first + kChunkRows : order.n_rows;
  FollowersOfLanes list(arguments.ngram_slots);
  bool begins = false, collides = false;
#pragma unroll 1
  for (int64_t newest = end - 1; newest >= first; newest -= 32) {
    const int64_t place = newest - lane;
    const bool starts = place >= first && starts_group(order, place);
    if (place >= first && !starts) collides |= !keys.same(order.rows[place], order.rows[place - 1]);
    const unsigned starting = __ballot_sync(kWholeWarp, starts);
    if (begins || list.is_full()) continue;
    const bool in_group = place >= first && (starting == 0 || lane < __ffs(int(starting)));
    const int64_t row = in_group ? order.rows[place] : 0;
    const bool has_key = in_group && order.sorted[place] != kNoKey;
    list.append(has_key ? keys.follower(row) : -1, int32_t(keys.end_of(row)));
    begins = starting != 0;
  }
  list.store(order, chunk, begins);
  collides = __any_sync(kWholeWarp, collides);
  if (lane == 0) order.collisions[chunk] = collides;
}

// The same of each span, from its chunks'.
static __global__ void __launch_bounds__(32 * kOrderWarps) span_lists_kernel(const RowOrder order, int64_t n_slots) {
  const int64_t span = int64_t(blockIdx.x) * kOrderWarps + threadIdx.x / 32;
  if (span >= order.n_spans()) return;
  FollowersOfLanes list(n_slots);
  const int64_t first = span * kSpanChunks;
  const int64_t end = first + kSpanChunks < order.n_chunks() ? first + kSpanChunks : order.n_chunks();
  bool is_open = true;
#pragma unroll 1
  for (int64_t chunk = end - 1; is_open && chunk >= first; --chunk) is_open = list.append_stored(order, chunk);
  list.store(order, order.n_chunks() + span, !is_open);
  const int lane = int(threadIdx.x) % 32;
  bool collides = false;
#pragma unroll 1
  for (int64_t chunk = first + lane; chunk < end; chunk += 32) collides |= order.collisions[chunk] != 0;
  collides = __any_sync(kWholeWarp, collides);
  if (lane == 0) order.collisions[order.n_chunks() + span] = collides;
}

// The n-gram slots of every row.
template <class Weight>
__global__ void __launch_bounds__(32 * kOrderWarps)
    ngram_slots_kernel(const RepetitionArguments<Weight> a, const TextFacts facts, const RowOrder order) {
  const int64_t chunk = int64_t(blockIdx.x) * kOrderWarps + threadIdx.x / 32;
  if (chunk >= order.n_chunks()) return;
  constexpr int64_t kNoTarget = -1, kNotCounted = -2;  // a target that no candidate equals
  const int lane = int(threadIdx.x) % 32;
  const Keys<Weight> keys(a, facts);
  FollowersOfLanes list(a.ngram_slots);
  if (!starts_group(order, chunk * kChunkRows)) {
    const int64_t span = chunk / kSpanChunks;
    bool is_open = true;
#pragma unroll 1
    for (int64_t before = chunk - 1; is_open && before >= span * kSpanChunks; --before)
      is_open = list.append_stored(order, before);
#pragma unroll 1
    for (int64_t before = span - 1; is_open && before >= 0; --before)
      is_open = list.append_stored(order, order.n_chunks() + before);
  }
  const Weight weight = Weight(a.weight(3));
  const int n_slots = int(a.ngram_slots);
  const int64_t end = (chunk + 1) * kChunkRows < order.n_rows ? (chunk + 1) * kChunkRows : order.n_rows;
#pragma unroll 1
  for (int64_t first = chunk * kChunkRows; first < end; first += 32) {
    const int n = end - first < 32 ? int(end - first) : 32;
    int64_t row = 0;
    int32_t follower = -1, target = kNoTarget;
    bool starts = false;
    if (lane < n) {
      row = order.rows[first + lane];
      starts = starts_group(order, first + lane);
      if (order.sorted[first + lane] != kNoKey) follower = keys.follower(row);
      const int64_t wide = a.targets.at(row / a.n_tokens, row % a.n_tokens);
      target = wide == a.ignore_index ? kNotCounted : wide >= 0 && wide < a.vocab_size ? int32_t(wide) : kNoTarget;
    }
    const int32_t key_end = int32_t(keys.end_of(row));
    const unsigned starting = __ballot_sync(kWholeWarp, starts);
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      if (starting >> i & 1) list.clear();
      const int64_t row_here = __shfl_sync(kWholeWarp, row, i);
      const int32_t follower_here = __shfl_sync(kWholeWarp, follower, i),
                    end_here = __shfl_sync(kWholeWarp, key_end, i), target_here = __shfl_sync(kWholeWarp, target, i);
      if (keys.follows_itself() && follower_here >= 0) list.move_to_front(follower_here, end_here);
      const int64_t slot = row_here * a.n_slots() + a.first_ngram_slot();
      const int64_t oldest = a.ngram_window_size > 0 ? end_here + keys.end_of_context() - a.ngram_window_size : 0;
      list.write(target_here, target_here == kNotCounted ? INT64_MAX : oldest, n_slots, weight, a.ids + slot,
                 a.candidate_weights + slot);
      if (!keys.follows_itself() && follower_here >= 0) list.move_to_front(follower_here, end_here);
    }
  }
}

template <class Weight>
void write_key_hashes(const RepetitionArguments<Weight>& arguments, const TextFacts& facts, const RowOrder& order,
                      Stream stream) {
  launch("repetition_candidates", key_hashes_kernel<Weight>, shape_of_tokens(order.n_rows), stream, arguments, facts,
         order);
}

// Once `sorted` and `rows` are there.
template <class Weight>
void write_ngram_slots(const RepetitionArguments<Weight>& arguments, const TextFacts& facts, const RowOrder& order,
                       Stream stream) {
  const auto shape = [](int64_t n_warps) {
    return LaunchShape{dim3(unsigned((n_warps + kOrderWarps - 1) / kOrderWarps)), dim3(32 * kOrderWarps)};
  };
  launch("repetition_candidates", chunk_lists_kernel<Weight>, shape(order.n_chunks()), stream, arguments, facts, order);
  launch("repetition_candidates", span_lists_kernel, shape(order.n_spans()), stream, order, arguments.ngram_slots);
  launch("repetition_candidates", ngram_slots_kernel<Weight>, shape(order.n_chunks()), stream, arguments, facts, order);
}

}  // namespace ava
