// row_loss and row_statistics of short rows: what a row costs besides its vectors outweighs them, so one warp takes
// several rows at once, and shares that cost among them.
//
//   1. each row by all lanes: maximum and sums
//   2. all rows together, each by its share of the lanes: entries, terms, coefficients
//   3. each row by all lanes: gradient; as soon as a vector is used, its place is filled with the row that follows there
//   4. all rows together: the few target and candidate columns over it, and the outputs
//
// No warp waits for another one. A row's result does not depend on how many are taken at once: an entry has a lane of
// its own, or the row the whole warp.
#pragma once
#include "softmax_rows_refill.cuh"

namespace ava {

// What a warp keeps in shared memory besides the vectors; behind it headers, scratches and entries of its rows.
struct alignas(16) ShortRowsBoard {
  LogitScale scale;
  RowOptions<float> options;
};

inline size_t short_rows_shared_bytes(int rows_at_once, int capacity, int n_ids) {
  return sizeof(ShortRowsBoard) +
         size_t(rows_at_once) * (size_t(capacity) * 16 + 2 * sizeof(RowHeader<float>) + sizeof(RowScratch<float>) +
                                 size_t(n_ids + 1) * sizeof(SparseEntry<float>));
}

template <class Element, Features kFeatures>
__global__ void __launch_bounds__(32, 24) short_row_loss_kernel(const RowArguments a) {  // 80 registers: no spills
  constexpr auto kResidence = Residence::warp;
  AVA_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x, n_rows = a.rows_at_once;
  const bool differentiates = a.grad_logits != nullptr;
  auto* const vectors = reinterpret_cast<uint4*>(shared);  // [n_rows, capacity]
  auto* const board = reinterpret_cast<ShortRowsBoard*>(vectors + n_rows * a.capacity);
  auto* const headers = reinterpret_cast<RowHeader<Element>*>(board + 1);               // [2, n_rows]
  auto* const scratches = reinterpret_cast<RowScratch<float>*>(headers + 2 * n_rows);   // [n_rows]
  auto* const all_entries = reinterpret_cast<SparseEntry<float>*>(scratches + n_rows);  // [n_rows, 1 + n_ids]

  const auto headers_of = [&](unsigned turn) { return headers + turn % 2 * unsigned(n_rows); };
  const auto kept_of = [&](int row) { return Kept<Element, kResidence>{vectors + row * a.capacity + lane}; };
  const auto announce = [&](unsigned turn) {
    if (lane < n_rows)
      headers_of(turn)[lane].announce(a, turn * a.row_step + blockIdx.x * unsigned(n_rows) + unsigned(lane), 0,
                                      turn > 0 ? headers_of(turn - 1) + lane : nullptr, true);
  };

  // of steps 2 and 4
  const int n_lanes = 32 / n_rows, own_row = lane / n_lanes;
  const Lanes lanes{lane % n_lanes, n_lanes, (n_lanes == 32 ? kWholeWarp : (1u << n_lanes) - 1) << own_row * n_lanes};
  RowScratch<float>* const scratch = scratches + own_row;
  SparseEntry<float>* const entries = all_entries + own_row * (1 + a.n_ids);

  announce(0);
  if (lane == 0) {
    board->options = *static_cast<const RowOptions<float>*>(a.options);
    board->scale = logit_scale(board->options);
  }
  __syncwarp();
  for (int r = 0; r < n_rows; ++r)
    if (headers[r].target >= 0) fetch_row(a, headers[r], kept_of(r));

  for (unsigned turn = 0; headers_of(turn)[0].target != kNoRow; ++turn) {
    const RowHeader<Element>* const now = headers_of(turn);
    const RowHeader<Element>* const next = headers_of(turn + 1);
    const RowHeader<Element>& own = now[own_row];
    announce(turn + 1);
    if (own.target >= 0) {
      const RowSlice<Element> row(a, own.part);
      gather_entries(a, own.index, a.targets ? own.target : -1, entries, lanes, [&](int c) { return row.logit(c); });
    }
    __syncwarp();
    cp_async_wait<0>();

    RowStatistics<float> statistics = empty_statistics<float>();
    unsigned careful_rows = 0;
#pragma unroll 1
    for (int r = 0; r < n_rows; ++r) {  // step 1
      if (now[r].target >= 0) {
        bool careful = false;
        const RowStatistics<float> measured = measure_kept<Element, kResidence, kFeatures>(
            RowSlice<Element>(a, now[r].part), kept_of(r), LogitScale(board->scale), [] {}, careful);
        if (r == own_row) statistics = measured;
        careful_rows |= unsigned(careful) << r;
      }
      if (!differentiates && next[r].target >= 0) fetch_row(a, next[r], kept_of(r));
    }

    if (own.target >= 0) {  // step 2
      statistics = finished(statistics, kFeatures != Features::plain);
      if (a.summaries) {
        write_summaries(a, board->options, own.index, statistics, entries, lanes);
      } else {
        evaluate_row(a, board->options, own.weight, statistics, entries, scratch, lanes);
        if (!differentiates) write_loss(a, own.index, own.weight, entries, scratch, lanes);
      }
    } else if (own.target != kNoRow) {
      write_nothing<float>(a, own.index, lanes);
    }
    __syncwarp();
    if (!differentiates) continue;

#pragma unroll 1
    for (int r = 0; r < n_rows && now[r].target != kNoRow; ++r) {  // step 3
      if (now[r].target >= 0)
        write_gradient<Element, kResidence, kFeatures>(a, now[r], next[r], kept_of(r), scratches + r, board->scale,
                                                       careful_rows >> r & 1);
      else
        write_row<Element, kResidence, kFeatures>(a, now[r], next[r], kept_of(r),
                                                  [](int, int) { return uint4{0, 0, 0, 0}; });
    }
    __syncwarp();
    if (own.target >= 0) {  // step 4
      const RowSlice<Element> row(a, own.part);
      write_entries(
          a, board->options, entries, scratch, lanes, [](int) { return true; },
          [&](int column, float value) { row.store_column(column, value); });
      write_loss(a, own.index, own.weight, entries, scratch, lanes);
    }
    __syncwarp();
  }
}

}  // namespace ava
