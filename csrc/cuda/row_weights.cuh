// Weights of rows on the device: one launch in place of some ten, and nothing comes back to the host.
//
// One block, which reads every row twice: the sums first, then each row's weight. It has 24 bytes to read for a row
// whose logits are thousands, so that more blocks, which would have to wait for each other, gain nothing.
#pragma once
#include "../row_weights.h"
#include "primitives.cuh"

namespace ava {

constexpr int kRowWeightsThreads = 1024, kRowWeightsWarps = kRowWeightsThreads / 32;

// Of all threads of a warp, in a fixed order: results are bitwise repeatable.
__device__ inline RowSums warp_sums(RowSums sums) {
  return {warp_sum(sums.n_counted), warp_sum(sums.weights), warp_sum(sums.of_classes)};
}

template <class Real>
__global__ void __launch_bounds__(kRowWeightsThreads) row_weights_kernel(const RowWeights<Real> rows) {
  AVA_SHARED(RowSums, of_warps, kRowWeightsWarps);
  const int64_t n_rows = rows.batch_size * rows.n_tokens;
  RowSums sums{};
  for (int64_t row = threadIdx.x; row < n_rows; row += kRowWeightsThreads)
    sums.add(sums_of_row(rows, row / rows.n_tokens, row % rows.n_tokens));
  sums = warp_sums(sums);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sums;
  __syncthreads();
  sums = warp_sums(of_warps[threadIdx.x % kRowWeightsWarps]);  // every warp all of them: no second barrier
  if (threadIdx.x == 0) *rows.n_counted = Real(sums.n_counted);
  const Real n = denominator(rows, sums);
  for (int64_t row = threadIdx.x; row < n_rows; row += kRowWeightsThreads)
    write_row(rows, row / rows.n_tokens, row % rows.n_tokens, n);
}

template <class Real>
void row_weights(const RowWeights<Real>& rows, Stream stream) {
  launch("count_rows", row_weights_kernel<Real>, {dim3(1), dim3(kRowWeightsThreads)}, stream, rows);
}

}  // namespace ava
