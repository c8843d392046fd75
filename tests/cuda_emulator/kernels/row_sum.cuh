// A kernel that uses the whole dialect, to prove it, and for tests/test_cuda_mutants.py to break it: sums of rows, each
// by a cluster of two blocks, with cp.async, shuffles, static and dynamic shared memory, and a result pushed to the
// other block.
#pragma once
#include "../../../csrc/cuda/primitives.cuh"

namespace ava {

constexpr int kRowSumThreads = 128, kRowSumCluster = 2;

template <class Element>
__global__ void __launch_bounds__(kRowSumThreads) row_sum_kernel(const Element* rows,  // [n_rows, n_columns]
                                                                 float* sums,          // [n_rows]
                                                                 int n_columns) {      // a multiple of kVectorSize
  AVA_DYNAMIC_SHARED(staged);                                                          // a vector of each thread
  AVA_SHARED(float, partial, kRowSumThreads / 32);                                     // of each warp
  float* const of_blocks = reinterpret_cast<float*>(staged) + 4 * kRowSumThreads;
  uint4* const slot = reinterpret_cast<uint4*>(staged) + threadIdx.x;
  const int rank = int(cluster_rank()), row = blockIdx.x / kRowSumCluster;
  const Element* const values = rows + int64_t(row) * n_columns;
  cluster_sync();  // the other block's shared memory is there

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
  if (threadIdx.x == 0) cluster_map(of_blocks, 0)[rank] = partial[0] + partial[1] + partial[2] + partial[3];
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0) sums[row] = of_blocks[0] + of_blocks[1];
}

template <class Element>
void row_sum(const Element* rows,  // [n_rows, n_columns]
             float* sums,          // [n_rows]
             int n_rows, int n_columns, Stream stream) {
  LaunchShape shape{dim3(n_rows * kRowSumCluster), dim3(kRowSumThreads)};
  shape.shared_bytes = kRowSumThreads * 16 + kRowSumCluster * sizeof(float);
  shape.cluster_size = kRowSumCluster;
  launch("row_sum", row_sum_kernel<Element>, shape, stream, rows, sums, n_columns);
}

}  // namespace ava
