// How the warps that share a row tell each other what they have found of it.
//
// Pushed, not pulled: every warp writes its partial into the shared memory of every block that has a part of the row.
// Within a block, a barrier says that all are there. In a cluster each block has an mbarrier that counts its own warps
// and the bytes that come in; nobody waits for stores to global memory, which a cluster's barrier would do for every
// row. Rows that count, and no others, are numbered; row n has the slots and the mbarrier n % 2.
//
// Two are enough. Say that a warp of block A pushes row n + 2 to block B. Before that it passed row n + 1, so that all
// warps of B had pushed row n + 1, and before that passed row n. Where a gradient is wanted, the warps of a block pass a
// row together, at the barrier behind which they know the coefficients, and warp 0 has waited and merged before it;
// elsewhere each of them waits for itself, and warp 0 merges before it pushes the next row. So by then
//   * B's phase of row n is over: bytes of row n + 2 are never counted in it,
//   * B's warp 0 has read the slots of row n.
// A block that is behind thus holds the others up by one row at most, and needs to tell them nothing else.
//
// In the end every block waits for its last row, and with that for every byte that is ever stored into it: no barrier of
// the cluster is needed before it ends.
//
// A block may write the gradient over the logits once it has passed the row. The candidates' logits, which warp 0 of any
// block reads, have arrived by then: they go to its shared memory, in front of a __syncwarp(), before it pushes its
// partial.
#pragma once
#include "../softmax_rows.h"
#include "primitives.cuh"

namespace ava {

struct alignas(16) Partial {
  RowStatistics<float> statistics;
};

// kDense: all six statistics; else max, argmax and rest, which are one vector
template <bool kClustered, bool kDense>
struct PartialExchange {
  Partial* partials;    // [2, cluster_size, n_warps]
  uint64_t* mbarriers;  // [2]
  int cluster_size;

  __device__ __forceinline__ int n_warps() const { return int(blockDim.x) / 32; }
  __device__ __forceinline__ Partial* of_row(unsigned row) const {
    return partials + int(row % 2) * cluster_size * n_warps();
  }

  // Also makes known what was written to shared memory before.
  __device__ __forceinline__ void begin() const {
    if constexpr (kClustered) {
      if (threadIdx.x < 2) mbarrier_init(mbarriers + threadIdx.x, n_warps());
      cluster_sync();  // shared memory may be written from outside once its block runs and has set them up
    } else {
      __syncthreads();
    }
  }

  // By every warp; all lanes have the same partial.
  __device__ __forceinline__ void push(unsigned row, const RowStatistics<float>& statistics, int rank) const {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    Partial* const slot = of_row(row) + rank * n_warps() + warp;
    if constexpr (kClustered) {
      constexpr int kVectors = kDense ? 2 : 1;
      uint64_t* const mbarrier = mbarriers + row % 2;
      __syncwarp();  // what the lanes did before is behind them when the warp arrives
      if (lane == 0) mbarrier_arrive_expecting(mbarrier, cluster_size * kVectors * 16);
      if (lane < cluster_size) {
        uint4 vectors[2] = {};
        memcpy(vectors, &statistics, sizeof(statistics));
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          store_async16(reinterpret_cast<uint4*>(slot) + i, vectors[i], mbarrier, lane);
      }
    } else {
      if (lane == 0) slot->statistics = statistics;
    }
  }

  // Until warp 0, or every warp, may read what all warps have pushed.
  __device__ __forceinline__ void wait(unsigned row, bool every_warp) const {
    if constexpr (kClustered) {
      if (every_warp || threadIdx.x < 32) mbarrier_wait(mbarriers + row % 2, row / 2 % 2);
    } else {
      __syncthreads();
    }
  }

  // Of the partials that this lane of warp 0 looks after.
  __device__ __forceinline__ RowStatistics<float> merged_of_lane(unsigned row, float inverse_temperature) const {
    const int n_partials = cluster_size * n_warps();
    const Partial* const now = of_row(row);
    const auto get = [&](int i) {
      RowStatistics<float> statistics = now[i].statistics;
      if constexpr (!kDense) statistics.weighted = statistics.sum = statistics.count = 0;
      return statistics;
    };
    int i = int(threadIdx.x);
    RowStatistics<float> total = i < n_partials ? get(i) : empty_statistics<float>();
#pragma unroll 1
    for (i += 32; i < n_partials; i += 32) total = merge(total, get(i), inverse_temperature);
    return total;
  }
};

}  // namespace ava
