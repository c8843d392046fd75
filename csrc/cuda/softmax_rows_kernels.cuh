// Statistics, every loss term and the gradient of rows of logits with one read and one write of the logits. For each
// row:
//
//   1. warp maximum, while the vectors arrive     2. sums against the warp's own maximum (never rescaled)
//   3. warp partials to every block of the cluster -> barrier -> warp 0 merges, evaluates, differentiates -> barrier
//   4. gradient; as soon as a vector is used, its place is filled with the next row of this block -> barrier
//   5. warp 0 writes the few target and candidate columns over it, in full precision, and the outputs of the row
//
// Filling the places again in step 4 keeps memory busy: reads of the next row and writes of this one are under way
// together without more buffers. Where no gradient is wanted, steps 4 and 5 are left out, and the places are filled
// again before step 3.
//
// In place is safe: a logit is overwritten by the thread that read it, behind the barrier before which warp 0 gathered
// the target's and the candidates' logits.
//
// The order of every sum depends on the row's length, its address modulo 16 and the device's limits alone.
#pragma once
#include "softmax_rows_measure.cuh"
#include "softmax_rows_slice.cuh"
#include "softmax_rows_sparse.cuh"

namespace ava {

inline size_t row_shared_bytes(bool kept_in_shared, int capacity, int cluster_size, int n_threads, int n_ids) {
  return (kept_in_shared ? size_t(capacity) * 16 : 0) + sizeof(LogitScale) + sizeof(RowScratch<float>) +
         size_t(2) * cluster_size * (n_threads / 32) * sizeof(RowStatistics<float>) +
         size_t(n_ids + 1) * sizeof(SparseEntry<float>);
}

// Statistics of this warp's vectors: steps 1 and 2 of what is above, with `gather` between them. `careful` is set where
// some logit of the warp needs the careful exponent.
template <class Element, Residence kResidence, Features kFeatures, class EachSlot, class Gather>
__device__ __forceinline__ RowStatistics<float> measure_kept(const RowSlice<Element>& row,
                                                             const Kept<Element, kResidence>& kept,
                                                             const LogitScale& scale, int n_stages, EachSlot each_slot,
                                                             Gather gather, bool& careful) {
  const int thread = threadIdx.x, n_threads = blockDim.x;
  float best = -INFINITY, lowest = INFINITY;
  int best_vector = kNoColumn;
  for (int stage = 0; stage < n_stages; ++stage) {
    if constexpr (Kept<Element, kResidence>::kStaged) {
      if (stage == 0) cp_async_wait<3>();
      if (stage == 1) cp_async_wait<2>();
      if (stage == 2) cp_async_wait<1>();
      if (stage == 3) cp_async_wait<0>();
    }
    each_slot(stage, [&](int i) {
      const int vector = row.first + i * n_threads + thread;
      if (vector >= row.last) return;
      float high, low;
      vector_range<Element>(kept.get(row, i, vector), high, low);
      if (high > best) best = high, best_vector = vector;
      lowest = fminf(lowest, low);
    });
  }
  gather();
  const float warp_best = warp_max(best);
  const int winner = warp_min(best == warp_best ? best_vector : kNoColumn);  // the first that holds the maximum
  const float reference = warp_best == -INFINITY ? 0.f : capped_logit<kFeatures>(warp_best, scale).value;
  if constexpr (kFeatures != Features::plain) careful = __any_sync(kWholeWarp, lowest < kLowestOrdinary);

  const auto sum_up = [&](auto is_careful) {
    const Exponent<Element, kFeatures, decltype(is_careful)::value> exponent(scale, reference);
    Sums sums;
    int argmax = kNoColumn;
    for (int stage = 0; stage < n_stages; ++stage)
      each_slot(stage, [&](int i) {
        const int vector = row.first + i * n_threads + thread;
        if (vector >= row.last) return;
        float logits[kVectorSize<Element>];
        unpack<Element>(kept.get(row, i, vector), logits);
        int excluded = -1;
        if (vector == winner) {
          excluded = first_equal<Element>(logits, warp_best);
          argmax = row.column(vector) + excluded < argmax ? row.column(vector) + excluded : argmax;
        }
        accumulate(logits, row.column(vector), excluded, exponent, sums, argmax);
      });
    sums.rest = warp_sum(sums.rest);
    if constexpr (kFeatures != Features::plain) {
      sums.weighted = warp_sum(sums.weighted);
      sums.sum = warp_sum(sums.sum);
      sums.count = warp_sum(sums.count);
    }
    return to_statistics(sums, exponent, warp_best == -INFINITY ? warp_best : reference, warp_min(argmax));
  };
  return with_care<Element, kFeatures>(careful || needs_care(reference, scale), sum_up);
}

// The same for a row that is not kept: every vector is a part of its own.
template <class Element, Features kFeatures>
__device__ __forceinline__ RowStatistics<float> measure_streamed(const RowSlice<Element>& row, const LogitScale& scale,
                                                                 int n_slots) {
  const int thread = threadIdx.x, n_threads = blockDim.x;
  RowStatistics<float> partial = empty_statistics<float>();
#pragma unroll(kFeatures == Features::capped ? 1 : 2)
  for (int i = 0; i < n_slots; ++i) {
    const int vector = row.first + i * n_threads + thread;
    if (vector >= row.last) break;
    const uint4 bits = row.load(vector);
    float high, low, logits[kVectorSize<Element>];
    vector_range<Element>(bits, high, low);
    unpack<Element>(bits, logits);
    const bool is_empty = high == -INFINITY;
    const float reference = is_empty ? 0.f : capped_logit<kFeatures>(high, scale).value;
    const Exponent<Element, kFeatures, true> exponent(scale, reference);
    const int excluded = is_empty ? -1 : first_equal<Element>(logits, high);
    int argmax = is_empty ? kNoColumn : row.column(vector) + excluded;
    Sums sums;
    accumulate(logits, row.column(vector), excluded, exponent, sums, argmax);
    partial =
        merge(partial, to_statistics(sums, exponent, is_empty ? high : reference, argmax), scale.inverse_temperature);
  }
  return merge_lanes(partial, scale.inverse_temperature);
}

// In place of a target: behind the last row. Told from a row that is left out, -1, so that the loop over rows keeps no
// comparison of indices in a register.
constexpr int32_t kNoRow = -2;

template <class Element, Residence kResidence, Features kFeatures>
// 64 registers, or 80 where the row lives in registers: no spills
__global__ void __launch_bounds__(kResidence == Residence::registers ? 256 : 1024,
                                  kResidence == Residence::registers ? 3 : 1) row_loss_kernel(const RowArguments a) {
  AVA_DYNAMIC_SHARED(shared);
  constexpr bool kClustered = kResidence == Residence::clusters, kStaged = Kept<Element, kResidence>::kStaged;
  constexpr int kStages = kStaged ? 4 : 1;  // the maximum of a quarter of the row is taken while the rest still arrives
  const int thread = threadIdx.x, n_threads = blockDim.x, warp = thread / 32, lane = thread % 32;
  const int n_warps = n_threads / 32;
  const int rank = kClustered ? int(cluster_rank()) : 0, cluster_size = kClustered ? a.cluster_size : 1;
  const bool differentiates = a.grad_logits != nullptr;

  unsigned char* const behind_slots = shared + (kStaged ? size_t(a.capacity) * 16 : 0);
  auto* const shared_scale = reinterpret_cast<LogitScale*>(behind_slots);
  auto* const scratch = reinterpret_cast<RowScratch<float>*>(shared_scale + 1);
  auto* const partials = reinterpret_cast<RowStatistics<float>*>(scratch + 1);  // [2, cluster_size, n_warps]
  auto* const entries = reinterpret_cast<SparseEntry<float>*>(partials + 2 * cluster_size * n_warps);  // [1 + n_ids]

  Kept<Element, kResidence> kept;
  kept.slots = reinterpret_cast<uint4*>(shared) + thread;
  // two vectors with hyperbolic tangents would spill; of float32, two come to no more than one of 16 bits
  constexpr int kUnrolled = kFeatures == Features::capped || sizeof(Element) == 4 ? 1 : 2;
  const auto each_slot = [&](int stage, auto body) {
    const int per_stage = (a.n_slots + kStages - 1) / kStages, begin = stage * per_stage, end = begin + per_stage;
    for_slots<kResidence, kUnrolled>(begin, end < a.n_slots ? end : a.n_slots, body);
  };

  const auto fetch_row = [&](unsigned index) {
    const RowSlice<Element> row(a, index, rank);
    for (int stage = 0; stage < kStages; ++stage) {
      each_slot(stage, [&](int i) { kept.fetch(row, i, row.first + i * n_threads + thread); });
      if constexpr (kStaged) cp_async_commit();
    }
  };

  const unsigned n_rows = unsigned(a.n_rows);
  unsigned row_index = blockIdx.x / cluster_size;
  int32_t target = row_index < n_rows ? counted_target(a, row_index) : kNoRow;
  if (target >= 0) fetch_row(row_index);
  if (thread == 0) *shared_scale = logit_scale(*static_cast<const RowOptions<float>*>(a.options));
  if constexpr (kClustered)
    cluster_sync();  // shared memory may be written from outside once its block runs
  else
    __syncthreads();

  int parity = 0;  // partials alternate, so that one barrier for a row is enough
  for (unsigned next_index; target != kNoRow; row_index = next_index) {
    next_index = row_index + a.row_step;
    const int32_t next_target = next_index < n_rows ? counted_target(a, next_index) : kNoRow;
    const auto write_row = [&](const RowSlice<Element>& row, auto gradient_of) {
      const RowSlice<Element> next(a, next_target >= 0 ? next_index : row_index, rank);
      const GradientSlice<Element> gradient(a, row, row_index);
      for (int stage = 0; stage < kStages; ++stage) {
        each_slot(stage, [&](int i) {
          const int vector = row.first + i * n_threads + thread;
          if (vector < row.last) gradient.store(vector, gradient_of(i, vector));
          if (next_target >= 0) kept.fetch(next, i, next.first + i * n_threads + thread);
        });
        if constexpr (kStaged) cp_async_commit();
      }
    };

    if (target < 0) {  // the same for the whole cluster; the logits are not looked at
      if (differentiates)
        write_row(RowSlice<Element>(a, row_index, rank), [](int, int) { return uint4{0, 0, 0, 0}; });
      else if (next_target >= 0)
        fetch_row(next_index);
      if (rank == 0 && warp == 0) write_nothing<float>(a, row_index, lane);
      target = next_target;
      continue;
    }

    [[maybe_unused]] bool careful = false;
    RowStatistics<float> partial;
    {
      const RowSlice<Element> row(a, row_index, rank);
      const LogitScale scale = *shared_scale;
      const auto gather = [&] {  // between steps 1 and 2: the logits are under way meanwhile
        if (warp > 0) return;
        for (int k = lane; k <= a.n_ids; k += 32)
          entries[k] = gathered<float>(a, row_index, a.targets ? target : -1, k, [&](int c) { return row.logit(c); });
      };
      if constexpr (kResidence == Residence::streamed) {
        gather();
        partial = measure_streamed<Element, kFeatures>(row, scale, a.n_slots);
      } else {
        partial = measure_kept<Element, kResidence, kFeatures>(row, kept, scale, kStages, each_slot, gather, careful);
      }
    }
    if (!differentiates && next_target >= 0) fetch_row(next_index);
    // pushed, not pulled: after the barrier every block has all partials in its own shared memory
    if (lane < cluster_size) {
      RowStatistics<float>* const slot = partials + (parity * cluster_size + rank) * n_warps + warp;
      *(kClustered ? cluster_map(slot, lane) : slot) = partial;
    }
    if constexpr (kClustered)
      cluster_sync();
    else
      __syncthreads();

    if (warp == 0) {
      RowStatistics<float> total = empty_statistics<float>();
      const float inverse_temperature = shared_scale->inverse_temperature;
      for (int i = lane; i < cluster_size * n_warps; i += 32)
        total = merge(total, partials[parity * cluster_size * n_warps + i], inverse_temperature);
      total = merge_lanes(total, inverse_temperature);
      total = finished(total, kFeatures != Features::plain);
      if (a.summaries) {
        if (rank == 0) write_summaries(a, row_index, total, entries, lane);
      } else {
        evaluate_row(a, row_index, total, entries, scratch, lane);
        if (!differentiates && rank == 0) write_loss(a, row_index, entries, scratch, lane);
      }
      __syncwarp();  // entries and scratch are free for the next row
    }
    if (differentiates) {
      __syncthreads();
      row_index = computed_again(row_index);
      const RowSlice<Element> row(a, row_index, rank);
      const LogitScale scale = *shared_scale;
      const float max = scratch->statistics.max, reference = max == -INFINITY ? 0.f : max;  // step 4
      const auto differentiate = [&](auto is_careful) {
        const Exponent<Element, kFeatures, decltype(is_careful)::value> exponent(scale, reference);
        const GradientScalars scalars = gradient_scalars(scratch->dense, exponent);
        write_row(row, [&](int i, int vector) { return gradient_vector(kept.get(row, i, vector), scalars, exponent); });
      };
      if constexpr (kResidence == Residence::streamed)
        differentiate(std::true_type());
      else
        with_care<Element, kFeatures>(careful || needs_care(reference, scale), differentiate);
      __syncthreads();
      if (warp == 0) {  // step 5
        row_index = computed_again(row_index);
        const RowSlice<Element> row(a, row_index, rank);
        const GradientSlice<Element> gradient(a, row, row_index);
        write_entries(
            a, entries, scratch, lane, [&](int column) { return row.has_column(column); },
            [&](int column, float value) { gradient.store_column(column, value); });
        if (rank == 0) write_loss(a, row_index, entries, scratch, lane);
        __syncwarp();
      }
    }
    target = next_target;
    parity ^= 1;
  }
  // no closing cluster_sync: partials are pushed, so nobody touches a block's shared memory behind the last barrier
}

}  // namespace ava
