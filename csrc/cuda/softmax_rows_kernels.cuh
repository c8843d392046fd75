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
#include "softmax_rows_refill.cuh"
#include "softmax_rows_sparse.cuh"

namespace ava {

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

template <class Element, Residence kResidence, Features kFeatures>
__global__ void __launch_bounds__(1024, 1) row_loss_kernel(const RowArguments a) {  // 64 registers: no spills
  AVA_DYNAMIC_SHARED(shared);
  constexpr bool kClustered = kResidence == Residence::clusters, kInShared = Kept<Element, kResidence>::kInShared;
  const int thread = threadIdx.x, n_threads = blockDim.x, warp = thread / 32;
  const Lanes lanes = whole_warp();
  const int n_warps = n_threads / 32;
  const int rank = kClustered ? int(cluster_rank()) : 0, cluster_size = kClustered ? a.cluster_size : 1;
  const bool differentiates = a.grad_logits != nullptr;

  auto* const board = reinterpret_cast<RowBoard<Element>*>(shared + (kInShared ? size_t(a.capacity) * 16 : 0));
  auto* const partials = reinterpret_cast<Partial*>(board + 1);  // [2, cluster_size, n_warps]
  auto* const entries = reinterpret_cast<SparseEntry<float>*>(partials + 2 * cluster_size * n_warps);  // [1 + n_ids]
  RowScratch<float>* const scratch = &board->scratch;
  const PartialExchange<kClustered, kFeatures != Features::plain> exchange{partials, board->mbarriers, cluster_size};

  const Kept<Element, kResidence> kept{reinterpret_cast<uint4*>(shared) + thread};
  // By one thread, two rows ahead: a barrier of the row between makes it known, and the wait for memory is nobody's.
  const auto announce = [&](unsigned turn) {
    if (thread != n_threads - 1) return;
    RowHeader<Element>* const last = turn > 0 ? &board->headers[(turn - 1) % board->kHeaders] : nullptr;
    board->headers[turn % board->kHeaders].announce(a, blockIdx.x / cluster_size + turn * a.row_step, rank, last,
                                                    kInShared);
  };

  announce(0);
  announce(1);
  if (thread == 0) {
    board->options = *static_cast<const RowOptions<float>*>(a.options);
    board->scale = logit_scale(board->options);
  }
  exchange.begin();
  if (board->headers[0].target >= 0) fetch_row(a, board->headers[0], kept);

  for (unsigned turn = 0;; ++turn) {
    const RowHeader<Element>& header = board->headers[turn % board->kHeaders];
    const RowHeader<Element>& next = board->headers[(turn + 1) % board->kHeaders];
    if (header.target == kNoRow) return;

    if (header.target < 0) {  // the same for the whole cluster; the logits are not looked at
      announce(turn + 2);
      if (differentiates)
        write_row<Element, kResidence, kFeatures>(a, header, next, kept, [](int, int) { return uint4{0, 0, 0, 0}; });
      else if (next.target >= 0)
        fetch_row(a, next, kept);
      if (rank == 0 && warp == 0) write_nothing<float>(a, header.index, lanes);
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
        if (warp == 0)
          gather_entries(a, header.index, a.targets ? header.target : -1, entries, lanes,
                         [&](int c) { return row.logit(c); });
      };
      if constexpr (kResidence == Residence::streamed) {
        gather();
        partial = measure_streamed<Element, kFeatures>(row, scale);
      } else {
        partial = measure_kept<Element, kResidence, kFeatures>(row, kept, scale, gather, careful);
      }
    }
    if (!differentiates && next.target >= 0) fetch_row(a, next, kept);
    exchange.push(header.number, partial, rank);
    exchange.wait(header.number, !differentiates);

    if (warp == 0) {
      const float inverse_temperature = board->scale.inverse_temperature;
      RowStatistics<float> total = exchange.merged_of_lane(header.number, inverse_temperature);
      total = merge_lanes<kFeatures != Features::plain>(total, inverse_temperature);
      total = finished(total, kFeatures != Features::plain);
      if (a.summaries) {
        if (rank == 0) write_summaries(a, board->options, header.index, total, entries, lanes);
      } else {
        evaluate_row(a, board->options, header.weight, total, entries, scratch, lanes);
        if (!differentiates && rank == 0) write_loss(a, header.index, header.weight, entries, scratch, lanes);
      }
      __syncwarp();  // entries and scratch are free for the next row
    }
    if (!differentiates) continue;
    __syncthreads();
    write_gradient<Element, kResidence, kFeatures>(a, header, next, kept, scratch, board->scale, careful);  // step 4
    __syncthreads();
    if (warp == 0) {                                 // step 5
      const RowSlice<Element> here(a, header.part);  // read again, not kept in registers
      write_entries(
          a, board->options, entries, scratch, lanes, [&](int column) { return here.has_column(column); },
          [&](int column, float value) { here.store_column(column, value); });
      if (rank == 0) write_loss(a, header.index, header.weight, entries, scratch, lanes);
      __syncwarp();
    }
  }
}

}  // namespace ava
