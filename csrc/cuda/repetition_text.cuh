// What a row's context says at once, for all rows of a text in linear time: where its segment starts, where its last
// run starts, how many rows before it count. The slots of immediate repetition and of early EOS need no more.
#pragma once
#include "repetition_arguments.cuh"

namespace ava {

// Of each position of each sequence, [n_sequences, n_tokens].
struct TextFacts {
  int32_t* text_start;  // first position of its segment
  int32_t* run_start;   // first position of the run of equal tokens that it belongs to; its own, if it is masked
  int32_t* n_counted;   // rows of the sequence before it that count
};
constexpr int kTextFacts = 3;

constexpr int kTextThreads = 256, kTextWarps = kTextThreads / 32;
constexpr int kTextItems = 8;  // positions of a thread; a tile has those of all threads

// Inclusive, over the lanes of a warp.
__device__ inline int scan_max(int value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, value, offset);
    value = before > value ? before : value;  // of the lanes without one before: their own value
  }
  return value;
}
__device__ inline int scan_sum(int value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, value, offset);
    if (int(threadIdx.x) % 32 >= offset) value += before;
  }
  return value;
}

// A block for each sequence, tile by tile. Starts are running maxima: positions grow.
template <class Weight>
__global__ void __launch_bounds__(kTextThreads)
    text_facts_kernel(const RepetitionArguments<Weight> a, const TextFacts facts) {
  AVA_SHARED(int, totals, 2 * kTextFacts * kTextWarps);  // of the warps, of this tile and the one before
  const int64_t sequence = blockIdx.x;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int text_start = 0, run_start = 0, n_counted = 0;  // before the tile
  int* shared = totals;
#pragma unroll 1
  for (int64_t tile = 0; tile < a.n_tokens; tile += kTextThreads * kTextItems) {
    const int64_t first = tile + int64_t(threadIdx.x) * kTextItems;
    int texts[kTextItems], runs[kTextItems], counted[kTextItems];  // of this thread's positions alone
    int text = 0, run = 0, count = 0;
#pragma unroll
    for (int i = 0; i < kTextItems; ++i) {
      const int64_t position = first + i;
      counted[i] = count;
      if (position < a.n_tokens) {
        const bool starts = position == 0 || (a.segments.data && a.segments.at(sequence, position) !=
                                                                     a.segments.at(sequence, position - 1));
        const int64_t token = a.tokens.at(sequence, position);
        if (starts) text = int(position);
        if (starts || token == a.ignore_index || token != a.tokens.at(sequence, position - 1)) run = int(position);
        count += a.targets.at(sequence, position) != a.ignore_index;
      }
      texts[i] = text;
      runs[i] = run;
    }
    const int text_to_here = scan_max(text), run_to_here = scan_max(run), count_to_here = scan_sum(count);
    if (lane == 31) {
      shared[warp] = text_to_here;
      shared[kTextWarps + warp] = run_to_here;
      shared[2 * kTextWarps + warp] = count_to_here;
    }
    __syncthreads();
    // lane i has what warp i has
    const auto of_warp = [&](int fact) { return lane < kTextWarps ? shared[fact * kTextWarps + lane] : 0; };
    const int text_of_warps = scan_max(of_warp(0)), run_of_warps = scan_max(of_warp(1)),
              count_of_warps = scan_sum(of_warp(2));
    // before this thread: what is before the tile, the warp, the lane
    const auto before = [&](int of_tile, int of_warps, int of_lanes, auto join) {
      const int of_other_warps = __shfl_sync(kWholeWarp, of_warps, warp > 0 ? warp - 1 : 0);
      const int of_other_lanes = __shfl_up_sync(kWholeWarp, of_lanes, 1);
      int result = of_tile;
      if (warp > 0) result = join(result, of_other_warps);
      return lane > 0 ? join(result, of_other_lanes) : result;
    };
    const auto larger = [](int x, int y) { return x > y ? x : y; };
    const auto sum = [](int x, int y) { return x + y; };
    const int text_before = before(text_start, text_of_warps, text_to_here, larger);
    const int run_before = before(run_start, run_of_warps, run_to_here, larger);
    const int count_before = before(n_counted, count_of_warps, count_to_here, sum);
#pragma unroll
    for (int i = 0; i < kTextItems; ++i)
      if (first + i < a.n_tokens) {
        const int64_t at = sequence * a.n_tokens + first + i;
        facts.text_start[at] = larger(text_before, texts[i]);
        facts.run_start[at] = larger(run_before, runs[i]);
        facts.n_counted[at] = count_before + counted[i];
      }
    text_start = larger(text_start, __shfl_sync(kWholeWarp, text_of_warps, 31));
    run_start = larger(run_start, __shfl_sync(kWholeWarp, run_of_warps, 31));
    n_counted += __shfl_sync(kWholeWarp, count_of_warps, 31);
    shared = totals + (shared == totals ? kTextFacts * kTextWarps : 0);  // the next tile's, while others still read
  }
}

// The slots of immediate repetition and of EOS; a thread for each row.
template <class Weight>
__global__ void __launch_bounds__(256) run_slots_kernel(const RepetitionArguments<Weight> a, const TextFacts facts) {
  const int64_t row_of_all = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row_of_all >= a.n_sequences * a.n_tokens) return;
  const int64_t sequence = row_of_all / a.n_tokens, row = row_of_all % a.n_tokens;
  const int64_t start = facts.text_start[row_of_all], last = row - 1 + a.tokens_include_row;  // of the context
  const int64_t target = a.targets.at(sequence, row);
  const bool counts = target != a.ignore_index;
  int32_t* ids = a.ids + row_of_all * a.n_slots();
  Weight* weights = a.candidate_weights + row_of_all * a.n_slots();
  const auto put = [&](bool is_there, int64_t id, double weight) {
    *ids++ = is_there ? int32_t(id) : -1;
    *weights++ = is_there ? Weight(weight) : Weight(0);
  };
  if (a.use_immediate_repetition_penalty) {
    const int64_t token = last >= start ? a.tokens.at(sequence, last) : a.ignore_index;
    const int64_t run = token == a.ignore_index ? 0 : last + 1 - facts.run_start[row_of_all - row + last];
    const bool repeats = counts && run > 0 && run >= a.immediate_repetition_threshold && token != target;
    put(repeats && a.may_penalize(token), token,
        a.weight(0) * fmin(power(a.weight(1), run > 0 ? run - 1 : 0), kMostRunFactor));
  }
  const int64_t n_before = facts.n_counted[row_of_all] - facts.n_counted[row_of_all - row + start];
  const bool is_early = counts && n_before < a.min_sequence_length && !a.is_eos(target);
#pragma unroll 1
  for (int64_t i = 0; i < a.n_eos; ++i) put(is_early, a.eos_ids[i], a.weight(2));
}

template <class Weight>
void write_text_facts(const RepetitionArguments<Weight>& arguments, const TextFacts& facts, Stream stream) {
  launch("repetition_candidates", text_facts_kernel<Weight>,
         {dim3(unsigned(arguments.n_sequences)), dim3(kTextThreads)}, stream, arguments, facts);
}

inline LaunchShape shape_of_tokens(int64_t n) { return {dim3(unsigned((n + 255) / 256)), dim3(256)}; }

template <class Weight>
void write_run_slots(const RepetitionArguments<Weight>& arguments, const TextFacts& facts, Stream stream) {
  launch("repetition_candidates", run_slots_kernel<Weight>, shape_of_tokens(arguments.n_sequences * arguments.n_tokens),
         stream, arguments, facts);
}

}  // namespace ava
