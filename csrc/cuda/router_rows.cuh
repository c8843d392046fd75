// The router family on the device; the formulas are in ../router_rows.h.
//
// Rows are cut into slots, each of one group: `rows_in_slot` rows that follow each other in their segment. A block adds
// up one slot and writes its sums to a workspace; then group_sums_kernel adds the slots of a group in order, in double.
// The cut depends on the group's own rows and on n_experts alone and nothing is added by atomics: results are repeatable
// bit by bit, and the same whatever else is in the call.
//
// Rows of segments come sorted (`order`, `segment_starts`). Only the device knows where segments end, so the grid has
// as many slots as there can be and some stay empty. Behind the last segment come the rows that have none.
#pragma once
#include <algorithm>

#include "../row_layout.h"
#include "router_rows_kernels.cuh"
#include "router_rows_wide.cuh"

namespace ava {

// Segment of each row as a key to sort by: those of negative ones, which are in no group, behind all.
static __global__ void segment_keys_kernel(const int64_t* segment_ids,  // [n_rows]
                                           int64_t n_rows, int64_t n_segments,
                                           int32_t* keys) {  // [n_rows]
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n_rows) return;
  const int64_t segment = segment_ids[row];
  AVA_DEVICE_CHECK(segment < n_segments);
  keys[row] = int32_t(segment < 0 ? n_segments : segment);
}

static __global__ void segment_starts_kernel(const int32_t* sorted_keys,  // [n_rows]
                                             int64_t n_rows, int64_t n_segments,
                                             int64_t* starts) {  // [n_segments + 2], the last is n_rows
  const int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place > n_rows) return;
  const int64_t before = place > 0 ? sorted_keys[place - 1] : -1,
                here = place < n_rows ? sorted_keys[place] : n_segments + 1;
  for (int64_t segment = before + 1; segment <= here; ++segment) starts[segment] = place;
}

inline LaunchShape shape_of_elements(int64_t n) {
  constexpr int kThreads = 256;
  return {dim3(unsigned((n + kThreads - 1) / kThreads)), dim3(kThreads)};
}
inline void write_segment_keys(const int64_t* segment_ids, int64_t n_rows, int64_t n_segments, int32_t* keys,
                               Stream stream) {
  if (n_rows == 0) return;
  launch("segment_keys", segment_keys_kernel, shape_of_elements(n_rows), stream, segment_ids, n_rows, n_segments, keys);
}
inline void write_segment_starts(const int32_t* sorted_keys, int64_t n_rows, int64_t n_segments, int64_t* starts,
                                 Stream stream) {
  launch("segment_starts", segment_starts_kernel, shape_of_elements(n_rows + 1), stream, sorted_keys, n_rows,
         n_segments, starts);
}

constexpr int kSumColumns = 32, kSumStrands = 8;  // of a block

// Sums of the slots of a group: strand i adds slots i, i + kSumStrands, ..., then strands are added in order.
template <class Real>
__global__ void __launch_bounds__(kSumColumns* kSumStrands)
    group_sums_kernel(const RouterArguments<Real> arguments, const RouterGroupSums<Real> out) {
  AVA_SHARED(double, partial_sums, kSumColumns* kSumStrands);
  AVA_SHARED(int64_t, partial_counts, kSumColumns* kSumStrands);
  const int64_t n_experts = arguments.n_experts, n_tiles = (3 * n_experts + 3 + kSumColumns - 1) / kSumColumns;
  const int64_t group = blockIdx.x / n_tiles;
  const int64_t layer = group / arguments.n_segments, segment = group % arguments.n_segments;
  const int in_block = int(threadIdx.x) % kSumColumns, strand = int(threadIdx.x) / kSumColumns;
  const int64_t column = blockIdx.x % n_tiles * kSumColumns + in_block, n_reals = 2 * n_experts + 2;
  const int64_t n_columns = n_reals + n_experts + 1;
  const RouterSlot rows = arguments.segment_rows(segment);
  const int64_t first_slot = layer * arguments.n_slots + arguments.first_slot(segment);
  const int64_t n_slots = (rows.end - rows.begin + arguments.rows_in_slot - 1) / arguments.rows_in_slot;
  double sum = 0;
  int64_t count = 0;
  if (column < n_reals) {
#pragma unroll 4
    for (int64_t slot = strand; slot < n_slots; slot += kSumStrands)
      sum += double(arguments.sums[(first_slot + slot) * n_reals + column]);
  } else if (column < n_columns) {
#pragma unroll 4
    for (int64_t slot = strand; slot < n_slots; slot += kSumStrands)
      count += arguments.counts[(first_slot + slot) * (n_experts + 1) + (column - n_reals)];
  }
  partial_sums[threadIdx.x] = sum;
  partial_counts[threadIdx.x] = count;
  __syncthreads();
  if (strand != 0 || column >= n_columns) return;
  for (int other = 1; other < kSumStrands; ++other) {
    sum += partial_sums[other * kSumColumns + in_block];
    count += partial_counts[other * kSumColumns + in_block];
  }
  if (column < n_experts)
    out.probability[group * n_experts + column] = Real(sum);
  else if (column < 2 * n_experts)
    out.importance[group * n_experts + (column - n_experts)] = Real(sum);
  else if (column == 2 * n_experts)
    out.lse_squared[group] = Real(sum);
  else if (column == 2 * n_experts + 1)
    out.entropy[group] = Real(sum);
  else if (column < n_reals + n_experts)
    out.counts[group * n_experts + (column - n_reals)] = count;
  else
    out.n_rows[group] = count;
}

template <class Real>
void add_group_sums(const RouterArguments<Real>& arguments, int64_t n_groups, const RouterGroupSums<Real>& out,
                    Stream stream) {
  const int64_t n_tiles = (3 * arguments.n_experts + 3 + kSumColumns - 1) / kSumColumns;
  if (n_groups == 0) return;
  launch("router_statistics", group_sums_kernel<Real>,
         {dim3(unsigned(n_groups * n_tiles)), dim3(kSumColumns * kSumStrands)}, stream, arguments, out);
}

// given: whether choices are, k for each row
template <class Real>
bool is_wide_router(int64_t n_experts, bool given, int64_t k) {
  return std::is_same<Real, double>::value || n_experts > kMostExpertsOfLanes || (given && k > kMostGivenChoices);
}

// Enough that what a block does once is little beside its rows, so few that there are blocks for every multiprocessor.
inline int64_t rows_in_slot(int64_t n_experts) {
  constexpr int64_t kLeast = 128, kOfEachThread = 8;
  if (n_experts > kMostExpertsOfLanes) return kLeast;
  return std::max(kLeast, kOfEachThread * kRouterThreads / lanes_of_row(n_experts));
}
// How many slots a layer has at most, empty ones included.
inline int64_t most_slots(int64_t n_rows, int64_t n_experts, int64_t n_segments, bool is_segmented) {
  const int64_t size = rows_in_slot(n_experts);
  return is_segmented ? n_rows / size + n_segments + 1 : (n_rows + size - 1) / size;
}

// What a pass takes of the arguments is in their comments. All layers in one launch (three, where a row is too long for
// registers).
template <class Element, bool kSigmoid>
void run_router(bool is_gradient, const RouterArguments<RealOf<Element>>& arguments, int64_t n_layers, Stream stream) {
  if (arguments.n_slots == 0 || n_layers == 0) return;
  if constexpr (!std::is_same<Element, double>::value) {
    if (!is_wide_router<float>(arguments.n_experts, arguments.is_given(), arguments.k))
      return run_router_lanes<Element, kSigmoid>(is_gradient, arguments, n_layers, stream);
  }
  run_router_wide<Element, kSigmoid>(is_gradient, arguments, n_layers, stream);
}

}  // namespace ava
