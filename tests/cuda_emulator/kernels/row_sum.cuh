// A kernel that uses the whole dialect, to prove it, and for tests/test_cuda_mutants.py to break it: sums of rows, each
// by a cluster of two blocks, with cp.async, shuffles, static and dynamic shared memory, and a result pushed to both
// blocks, which an mbarrier counts.
#pragma once
#include "../../../csrc/cuda/primitives.cuh"

namespace ava {

constexpr int kRowSumThreads = 128, kRowSumCluster = 2;

template <class Element>
__global__ void __launch_bounds__(kRowSumThreads) row_sum_kernel(const Element* rows,  // [n_rows, n_columns]
                                                                 float* sums,          // [n_rows]
                                                                 int n_rows,
                                                                 int n_columns) {  // a multiple of kVectorSize
  AVA_DYNAMIC_SHARED(staged);                                                      // a vector of each thread
  AVA_SHARED(float, partial, kRowSumThreads / 32);                                 // of each warp
  uint4* const slot = reinterpret_cast<uint4*>(staged) + threadIdx.x;
  uint4* const of_blocks = reinterpret_cast<uint4*>(staged) + kRowSumThreads;               // [2, kRowSumCluster]
  uint64_t* const mbarriers = reinterpret_cast<uint64_t*>(of_blocks + 2 * kRowSumCluster);  // [2]
  const int rank = int(cluster_rank()), n_clusters = int(gridDim.x) / kRowSumCluster;
  if (threadIdx.x < 2) mbarrier_init(mbarriers + threadIdx.x, 1);
  cluster_sync();  // those of the other block are there

  for (int turn = 0, row = blockIdx.x / kRowSumCluster; row < n_rows; ++turn, row += n_clusters) {
    const Element* const values = rows + int64_t(row) * n_columns;
    float sum = 0;
    for (int column = (rank * kRowSumThreads + threadIdx.x) * kVectorSize<Element>; column < n_columns;
         column += kRowSumCluster * kRowSumThreads * kVectorSize<Element>) {
      cp_async16(slot, values + column);
      cp_async_commit();
      cp_async_wait<0>();
      float unpacked[kVectorSize<Element>];
      unpack<Element>(*slot, unpacked);
      for (float value : unpacked) sum += value;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    // who comes to row n + 2 knows that both blocks have come to row n + 1, and so are done with row n
    uint4* const now = of_blocks + turn % 2 * kRowSumCluster;
    if (threadIdx.x == 0) {
      sum = partial[0] + partial[1] + partial[2] + partial[3];
      mbarrier_arrive_expecting(mbarriers + turn % 2, kRowSumCluster * 16);
      for (int other = 0; other < kRowSumCluster; ++other)
        store_async16(now + rank, {__float_as_uint(sum), 0, 0, 0}, mbarriers + turn % 2, other);
    }
    mbarrier_wait(mbarriers + turn % 2, turn / 2 % 2);
    if (rank == 0 && threadIdx.x == 0) sums[row] = __uint_as_float(now[0].x) + __uint_as_float(now[1].x);
  }
}

template <class Element>
void row_sum(const Element* rows,  // [n_rows, n_columns]
             float* sums,          // [n_rows]
             int n_rows, int n_columns, Stream stream) {
  LaunchShape shape{dim3(kRowSumCluster), dim3(kRowSumThreads)};
  shape.shared_bytes = (kRowSumThreads + 2 * kRowSumCluster + 1) * 16;
  shape.cluster_size = kRowSumCluster;
  launch("row_sum", row_sum_kernel<Element>, shape, stream, rows, sums, n_rows, n_columns);
}

}  // namespace ava
