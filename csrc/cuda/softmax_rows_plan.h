// Which kernel a row is for: by its length, its type and the device, never by the number of rows, so that a row's
// result does not depend on that.
//
// Bytes under way hide the memory's latency: on an H200 4.3 TB/s times 0.7 us over 132 multiprocessors are 23 KB, which
// any part of a long row exceeds. What is scarce is *overlap*: while a part is summed, or waits at a barrier, it asks
// for nothing. So two to four parts on a multiprocessor, at different stages, come before one large one.
//
// A short row is bound by what it costs besides its elements: some 400 instructions of every warp, and as many again of
// one warp alone, one after the other. So it gets few warps, one where possible, which then takes as many rows at once as
// there is room for, and many rows are on a multiprocessor at the same time.
#pragma once
#include "softmax_rows_kernels.cuh"
#include "softmax_rows_short.cuh"

namespace ava {

struct RowPlan {
  Residence residence;
  int cluster_size;  // blocks for a row
  int rows_at_once;  // of a block
  int capacity;      // 16-byte vectors in a block's part at most
  int n_threads;
  int blocks_per_multiprocessor;
  size_t shared_bytes;

  // Clusters that work at the same time, as far as shared memory and registers go.
  int clusters_at_once(const DeviceLimits& device) const {
    const int at_once = device.n_multiprocessors * blocks_per_multiprocessor / cluster_size;
    return at_once > 1 ? at_once : 1;
  }
};

constexpr int kThreadsPerMultiprocessor = 1024;              // at 64 registers
constexpr int kMostShortThreads = 96, kMostWarpBlocks = 24;  // of a warp that has whole rows: at 80 registers
constexpr int kMostLongBlocks = 8;
constexpr int kEnoughShortThreads = 640;  // on a multiprocessor: five warps for each of its schedulers

inline int blocks_that_fit(size_t shared_bytes, const DeviceLimits& device) {
  if (shared_bytes > size_t(device.shared_per_block)) return 0;
  return int(device.shared_per_multiprocessor / (shared_bytes + device.shared_reserved_per_block));
}

// One warp for as many rows as leave a multiprocessor enough warps, where each entry of a row gets a lane, or for one.
inline bool plan_warp(RowPlan& plan, int row_vectors, int n_ids, const DeviceLimits& device) {
  for (int n_rows = 32; n_rows > 0; n_rows /= 2) {
    const size_t bytes = short_rows_shared_bytes(n_rows, row_vectors, n_ids);
    const int fit = blocks_that_fit(bytes, device);
    if (fit * 32 < kEnoughShortThreads || (n_rows > 1 && n_rows * (n_ids + 1) > 64)) continue;
    plan.residence = Residence::warp;
    plan.cluster_size = 1;
    plan.rows_at_once = n_rows;
    plan.capacity = row_vectors;
    plan.n_threads = 32;
    plan.blocks_per_multiprocessor = fit < kMostWarpBlocks ? fit : kMostWarpBlocks;
    plan.shared_bytes = bytes;
    return true;
  }
  return false;
}

// One block for a row, the smallest of which enough fit to keep a multiprocessor busy.
inline bool plan_short(RowPlan& plan, int row_vectors, int n_ids, const DeviceLimits& device) {
  for (int n_threads = 64; n_threads <= kMostShortThreads; n_threads += 32) {
    const size_t bytes = row_shared_bytes(true, row_vectors, 1, n_threads, n_ids);
    const int fit = blocks_that_fit(bytes, device);
    const int n_blocks = fit < kThreadsPerMultiprocessor / n_threads ? fit : kThreadsPerMultiprocessor / n_threads;
    if (n_blocks <= kMostLongBlocks || n_blocks * n_threads < kEnoughShortThreads) continue;
    plan.residence = Residence::shared;
    plan.cluster_size = 1;
    plan.capacity = row_vectors;
    plan.n_threads = n_threads;
    plan.blocks_per_multiprocessor = n_blocks;
    plan.shared_bytes = bytes;
    return true;
  }
  return false;
}

// The smallest cluster that leaves room for `wanted` parts on a multiprocessor.
inline bool plan_shared(RowPlan& plan, int row_vectors, int n_ids, const DeviceLimits& device, int wanted) {
  for (int cluster = 1; cluster <= device.largest_cluster; cluster *= 2) {
    const int capacity = (row_vectors + cluster - 1) / cluster;
    const size_t most_bytes = row_shared_bytes(true, capacity, cluster, kThreadsPerMultiprocessor / wanted, n_ids);
    const int fit = blocks_that_fit(most_bytes, device);
    if (fit < wanted) continue;
    plan.residence = cluster > 1 ? Residence::clusters : Residence::shared;
    plan.cluster_size = cluster;
    plan.capacity = capacity;
    plan.blocks_per_multiprocessor = fit < kMostLongBlocks ? fit : kMostLongBlocks;
    plan.n_threads = kThreadsPerMultiprocessor / plan.blocks_per_multiprocessor / 32 * 32;
    plan.shared_bytes = row_shared_bytes(true, capacity, cluster, plan.n_threads, n_ids);
    return true;
  }
  return false;
}

inline RowPlan plan_rows(int n_columns, int element_bytes, int n_ids, const DeviceLimits& device) {
  const int size = 16 / element_bytes;
  const int row_vectors = (n_columns + size - 1) / size + 1;  // one more where a row straddles a boundary
  RowPlan plan{};
  plan.rows_at_once = 1;
  if (plan_warp(plan, row_vectors, n_ids, device)) return plan;
  if (plan_short(plan, row_vectors, n_ids, device)) return plan;
  if (plan_shared(plan, row_vectors, n_ids, device, 2)) return plan;
  if (plan_shared(plan, row_vectors, n_ids, device, 1)) return plan;
  plan.residence = Residence::streamed;  // the second time partly from L2
  plan.cluster_size = 1;
  plan.capacity = row_vectors;
  plan.n_threads = 512;
  plan.blocks_per_multiprocessor = 2;
  plan.shared_bytes = row_shared_bytes(false, 0, 1, plan.n_threads, n_ids);
  return plan;
}

}  // namespace ava
