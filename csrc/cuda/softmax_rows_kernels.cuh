// Statistics, every loss term and the gradient of rows of logits with one read and one write of the logits. For each
// row:
//
//   1. warp maximum, while the vectors arrive     2. sums against the warp's own maximum (never rescaled)
//   3. warp partials to every block of the cluster; warp 0 of each waits for all, merges, evaluates, differentiates
//      -> barrier
//   4. gradient; as soon as a vector is used, its place is filled with the next row of this block -> barrier
//   5. warp 0 writes the few target and candidate columns over it, in full precision, and the outputs of the row
//
// Filling the places again in step 4 keeps memory busy: reads of the next row and writes of this one are under way
// together without more buffers. Where no gradient is wanted, steps 4 and 5 are left out, and the places are filled
// again before step 3.
//
// In place is safe: a logit is overwritten by the thread that read it, behind step 3, before which warp 0 of every block
// gathered the target's and the candidates' logits.
//
// The order of every sum depends on the row's length, its address modulo 16 and the device's limits alone.
#pragma once
#include "softmax_rows_exchange.cuh"
#include "softmax_rows_measure.cuh"
#include "softmax_rows_slice.cuh"
#include "softmax_rows_sparse.cuh"

namespace ava {

// In place of a target: behind the last row.
constexpr int32_t kNoRow = -2;

// What a block knows of a row before it has seen a logit.
template <class Element>
struct RowHeader {
  RowPart<Element> part;
  unsigned index;
  unsigned number;  // among the rows of this block that count
  int32_t target;   // -1: the row is left out; kNoRow
  float weight;
  // Of this row and of the next, whose vectors take the places of this one's: the vectors of the longer one; and those that
  // move 16 bytes at once in the logits, the gradient and the next row, but for the first if that is an edge of either.
  // Where no row follows that counts none does: the last row of a block may take a little longer.
  Share all, whole;
  int32_t begins_with_edge;

  __device__ __forceinline__ void join(const RowHeader& next, bool is_staged) {
    const bool has_next = next.target >= 0;
    all = has_next ? larger(part.all, next.part.all) : part.all;
    whole = has_next ? smaller(part.whole, next.part.whole) : part.whole;
    begins_with_edge = part.begins_with_edge() || (has_next && next.part.begins_with_edge());
    if (part.n_whole_in_gradient == 0 || (is_staged && !has_next)) whole = {0, 0};
  }
};

// What the threads of a block tell each other, in shared memory; behind it partials and entries.
template <class Element>
struct alignas(16) RowBoard {
  static constexpr int kHeaders = 4;  // this row, the next, the one behind it; the last, which warp 0 may still read
  RowHeader<Element> headers[kHeaders];
  LogitScale scale;
  RowOptions<float> options;
  RowScratch<float> scratch;
  uint64_t mbarriers[2];  // of a cluster
};

inline size_t row_shared_bytes(bool kept_in_shared, int capacity, int cluster_size, int n_threads, int n_ids) {
  return (kept_in_shared ? size_t(capacity) * 16 : 0) + sizeof(RowBoard<float>) +
         size_t(2) * cluster_size * (n_threads / 32) * sizeof(Partial) + size_t(n_ids + 1) * sizeof(SparseEntry<float>);
}

// Writes the gradient of this row, whose vectors gradient_of(i, vector) makes, and fills their places with the next row.
template <class Element, Residence kResidence, Features kFeatures, class GradientOf>
__device__ __forceinline__ void write_row(const RowArguments& a, const RowHeader<Element>& header,
                                          const RowHeader<Element>& next_header, Kept<Element, kResidence>& kept,
                                          GradientOf gradient_of) {
  constexpr bool kStaged = Kept<Element, kResidence>::kStaged;
  const int thread = threadIdx.x, n_threads = blockDim.x;
  const bool has_next = next_header.target >= 0;
  const RowSlice<Element> row(a, header.part), next(a, next_header.part);
  const int first = row.first + thread, n_mine = row.all.of(thread), n_next = has_next ? next.all.of(thread) : 0;
  const auto write_slot = [&](int i) {
    if (i < n_mine) row.store(first + i * n_threads, gradient_of(i, first + i * n_threads));
    if (i < n_next) kept.fetch(next, i, next.first + thread + i * n_threads);
  };
  if constexpr (kResidence == Residence::registers) {
    for_slots<kResidence, 1>(0, a.n_slots, write_slot);
  } else {
    // in slots [begin, end) nothing is asked
    const int begin = thread == 0 ? header.begins_with_edge : 0, end = max(begin, header.whole.of(thread));
    const int last = header.all.of(thread);
#pragma unroll 1
    for (int i = begin > 0 ? 0 : end; i < last; i = i + 1 == begin ? end : i + 1) write_slot(i);  // in the first stage
    auto* const gradient = reinterpret_cast<uint4*>(row.gradient);
    const auto* const source = reinterpret_cast<const uint4*>(next.address(next.first - row.first));
    int from = begin, to = min(end, slots_of_stage<kResidence>(a, 0).end);
#pragma unroll 1
    for (int stage = 0; stage < kStages<kResidence>; ++stage) {
      for_slots<kResidence, kSlotsAtOnce<Element, kFeatures>>(from, to, [&](int i) {
        const int vector = first + i * n_threads;
        store16(gradient + vector, gradient_of(i, vector));
        if constexpr (kStaged) cp_async16(kept.slots + i * n_threads, source + vector);
      });
      from = to;
      to = end;
      if constexpr (kStaged) cp_async_commit();
    }
  }
}

template <class Element, Residence kResidence, Features kFeatures>
// 64 registers, or 80 where the row lives in registers: no spills
__global__ void __launch_bounds__(kResidence == Residence::registers ? 256 : 1024,
                                  kResidence == Residence::registers ? 3 : 1) row_loss_kernel(const RowArguments a) {
  AVA_DYNAMIC_SHARED(shared);
  constexpr bool kClustered = kResidence == Residence::clusters, kStaged = Kept<Element, kResidence>::kStaged;
  const int thread = threadIdx.x, n_threads = blockDim.x, warp = thread / 32, lane = thread % 32;
  const int n_warps = n_threads / 32;
  const int rank = kClustered ? int(cluster_rank()) : 0, cluster_size = kClustered ? a.cluster_size : 1;
  const bool differentiates = a.grad_logits != nullptr;

  auto* const board = reinterpret_cast<RowBoard<Element>*>(shared + (kStaged ? size_t(a.capacity) * 16 : 0));
  auto* const partials = reinterpret_cast<Partial*>(board + 1);  // [2, cluster_size, n_warps]
  auto* const entries = reinterpret_cast<SparseEntry<float>*>(partials + 2 * cluster_size * n_warps);  // [1 + n_ids]
  RowScratch<float>* const scratch = &board->scratch;
  const PartialExchange<kClustered, kFeatures != Features::plain> exchange{partials, board->mbarriers, cluster_size};

  Kept<Element, kResidence> kept;
  kept.slots = reinterpret_cast<uint4*>(shared) + thread;
  const auto fetch_row = [&](const RowHeader<Element>& header) {
    const RowSlice<Element> row(a, header.part);
#pragma unroll 1
    for (int stage = 0; stage < kStages<kResidence>; ++stage) {
      const SlotRange range = slots_of_stage<kResidence>(a, stage);
      for_slots<kResidence, 1>(range.begin, range.end,
                               [&](int i) { kept.fetch(row, i, row.first + i * n_threads + thread); });
      if constexpr (kStaged) cp_async_commit();
    }
  };
  // By one thread, two rows ahead: a barrier of the row between makes it known, and the wait for memory is nobody's.
  const auto announce = [&](unsigned turn) {
    if (thread != n_threads - 1) return;
    RowHeader<Element>& header = board->headers[turn % board->kHeaders];
    RowHeader<Element>& last = board->headers[(turn + board->kHeaders - 1) % board->kHeaders];
    const unsigned index = blockIdx.x / cluster_size + turn * a.row_step;
    if (index >= unsigned(a.n_rows)) {
      header.target = kNoRow;
      header.part = last.part;  // looked at by all, used by nobody
    } else {
      header.number = turn == 0 ? 0 : last.number + (last.target >= 0);
      header.weight = weight_of<float>(a, index);
      header.part = RowPart<Element>(a, index, rank);
      header.index = index;
      header.target = counted_target(a, index);
    }
    if (turn > 0 && last.target != kNoRow) last.join(header, kStaged);
  };

  announce(0);
  announce(1);
  if (thread == 0) {
    board->options = *static_cast<const RowOptions<float>*>(a.options);
    board->scale = logit_scale(board->options);
  }
  exchange.begin();
  if (board->headers[0].target >= 0) fetch_row(board->headers[0]);

  for (unsigned turn = 0;; ++turn) {
    const RowHeader<Element>& header = board->headers[turn % board->kHeaders];
    const RowHeader<Element>& next = board->headers[(turn + 1) % board->kHeaders];
    if (header.target == kNoRow) return;
    const auto write_with = [&](auto gradient_of) {
      write_row<Element, kResidence, kFeatures>(a, header, next, kept, gradient_of);
    };

    if (header.target < 0) {  // the same for the whole cluster; the logits are not looked at
      announce(turn + 2);
      if (differentiates)
        write_with([](int, int) { return uint4{0, 0, 0, 0}; });
      else if (next.target >= 0)
        fetch_row(next);
      if (rank == 0 && warp == 0) write_nothing<float>(a, header.index, lane);
      __syncthreads();
      continue;
    }

    [[maybe_unused]] bool careful = false;
    RowStatistics<float> partial;
    {
      const RowSlice<Element> row(a, header.part);
      const LogitScale scale = board->scale;
      const auto gather = [&] {  // between steps 1 and 2: the logits are under way meanwhile
        announce(turn + 2);
        if (warp > 0) return;
        for (int k = lane; k <= a.n_ids; k += 32)
          entries[k] =
              gathered<float>(a, header.index, a.targets ? header.target : -1, k, [&](int c) { return row.logit(c); });
      };
      if constexpr (kResidence == Residence::streamed) {
        gather();
        partial = measure_streamed<Element, kFeatures>(row, scale);
      } else {
        partial = measure_kept<Element, kResidence, kFeatures>(row, kept, scale, gather, careful);
      }
    }
    if (!differentiates && next.target >= 0) fetch_row(next);
    exchange.push(header.number, partial, rank);
    exchange.wait(header.number, !differentiates);

    if (warp == 0) {
      const float inverse_temperature = board->scale.inverse_temperature;
      RowStatistics<float> total = exchange.merged_of_lane(header.number, inverse_temperature);
      total = merge_lanes<kFeatures != Features::plain>(total, inverse_temperature);
      total = finished(total, kFeatures != Features::plain);
      if (a.summaries) {
        if (rank == 0) write_summaries(a, board->options, header.index, total, entries, lane);
      } else {
        evaluate_row(a, board->options, header.weight, total, entries, scratch, lane);
        if (!differentiates && rank == 0) write_loss(a, header.index, header.weight, entries, scratch, lane);
      }
      __syncwarp();  // entries and scratch are free for the next row
    }
    if (!differentiates) continue;
    __syncthreads();
    const RowSlice<Element> row(a, header.part);
    {
      const LogitScale scale = board->scale;
      const float max = scratch->statistics.max, reference = max == -INFINITY ? 0.f : max;  // step 4
      const auto differentiate = [&](auto is_careful) {
        const Exponent<Element, kFeatures, decltype(is_careful)::value> exponent(scale, reference);
        const GradientScalars scalars = gradient_scalars(scratch->dense, exponent);
        write_with([&](int i, int vector) { return gradient_vector(kept.get(row, i, vector), scalars, exponent); });
      };
      if constexpr (kResidence == Residence::streamed)
        differentiate(std::true_type());
      else
        with_care<Element, kFeatures>(careful || needs_care<kFeatures>(reference, scale), differentiate);
    }
    __syncthreads();
    if (warp == 0) {                                 // step 5
      const RowSlice<Element> here(a, header.part);  // read again, not kept in registers
      write_entries(
          a, board->options, entries, scratch, lane, [&](int column) { return here.has_column(column); },
          [&](int column, float value) { here.store_column(column, value); });
      if (rank == 0) write_loss(a, header.index, header.weight, entries, scratch, lane);
      __syncwarp();
    }
  }
}

}  // namespace ava
