// The kernels that need nothing of a row but its elements, one after the other: the gradient from given statistics and
// coefficients, and rows times a factor. A row is cut into parts of 32 KB, a block for each.
#pragma once
#include "softmax_rows_measure.cuh"
#include "softmax_rows_slice.cuh"
#include "softmax_rows_sparse.cuh"

namespace ava {

constexpr int kPartThreads = 256, kPartVectors = 8, kVectorsAhead = 4;
constexpr int kPartCapacity = kPartThreads * kPartVectors;

// Vectors are read before it is known what to do with them, so that the wait for coefficients is not added to theirs.
template <class Element>
struct VectorsAhead {
  uint4 vectors[kVectorsAhead];

  __device__ __forceinline__ void load(const RowSlice<Element>& row, int first) {
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      const int vector = first + i * kPartThreads;
      if (vector < row.last) vectors[i] = row.load(vector);
    }
  }
  template <class Body>
  __device__ __forceinline__ void each(const RowSlice<Element>& row, int first, Body body) const {
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      const int vector = first + i * kPartThreads;
      if (vector < row.last) body(vector, vectors[i]);
    }
  }
};

template <class Element, class Body>
__device__ __forceinline__ void for_vectors(const RowSlice<Element>& row, VectorsAhead<Element>& ahead, Body body) {
  constexpr int kStride = kVectorsAhead * kPartThreads;
  for (int first = row.first + int(threadIdx.x); first < row.last; first += kStride) {
    ahead.each(row, first, body);
    ahead.load(row, first + kStride);
  }
}

// grid: rows, parts
template <class Element, Features kFeatures>
__global__ void __launch_bounds__(kPartThreads) row_gradient_kernel(const RowArguments a) {
  AVA_DYNAMIC_SHARED(shared);
  auto* const scratch = reinterpret_cast<RowScratch<float>*>(shared);
  auto* const entries = reinterpret_cast<SparseEntry<float>*>(scratch + 1);  // [1 + n_ids]
  const int64_t row_index = blockIdx.x;
  const int thread = threadIdx.x;
  const Lanes lanes = whole_warp();
  const RowOptions<float>& options = *static_cast<const RowOptions<float>*>(a.options);
  const RowSlice<Element> row(a, RowPart<Element>(a, blockIdx.x, int(blockIdx.y)));
  const RowStatistics<float> statistics = static_cast<const RowStatistics<float>*>(a.statistics)[row_index];
  if (statistics.count == 0) {
    for (int vector = row.first + thread; vector < row.last; vector += kPartThreads)
      row.store(vector, uint4{0, 0, 0, 0});
    return;
  }

  VectorsAhead<Element> ahead;
  ahead.load(row, row.first + thread);
  if (thread < 32) {
    const auto logit = [&](int column) { return row.has_column(column) ? row.logit(column) : 0.f; };  // else another's
    const int32_t argmax = statistics.argmax < float(a.vocab_size) ? int32_t(statistics.argmax) : -1;
    gather_entries(a, row_index, argmax, entries, lanes, logit);
    take_coefficients(a, options, row_index, statistics, entries, scratch, lanes);
  }
  __syncthreads();

  const LogitScale scale = logit_scale(options);
  const Exponent<Element, kFeatures, false> usual(scale, statistics.max);
  const GradientScalars scalars = gradient_scalars(scratch->dense, usual);
  const bool all_careful = needs_care<kFeatures>(statistics.max, scale);
  for_vectors(row, ahead, [&](int vector, uint4 logits) {
    [[maybe_unused]] float high, low = 0;  // without b and k, e = 0 is all that a masked or low column needs
    if constexpr (kFeatures != Features::plain) vector_range<Element>(logits, high, low);
    with_care<Element, kFeatures>(all_careful || low < kLowestOrdinary, [&](auto is_careful) {
      if constexpr (!decltype(is_careful)::value) {
        row.store(vector, gradient_vector(logits, scalars, usual));
      } else {
        const Exponent<Element, kFeatures, true> exponent(scale, statistics.max);
        row.store(vector, gradient_vector(logits, gradient_scalars(scratch->dense, exponent), exponent));
      }
    });
  });
  __syncthreads();
  if (thread < 32)
    write_entries(
        a, options, entries, scratch, lanes, [&](int column) { return row.has_column(column); },
        [&](int column, float value) { row.store_column(column, value); });
}

// rows *= factors, in place; a row whose factor is 1 or whose target is ignored is not touched: most calls touch none.
// So a few blocks stay, each takes every gridDim.x-th unit, and looks up the factors of many at once. Unit u is part
// u % cluster_size of row u / cluster_size.
template <class Element>
__global__ void __launch_bounds__(kPartThreads) scale_rows_kernel(const RowArguments a) {
  AVA_SHARED(float, factors, kPartThreads);
  AVA_SHARED(int, has_work, kPartThreads / 32);  // 0 or 1, of the units that one warp has looked up
  const unsigned n_parts = unsigned(a.cluster_size), n_units = unsigned(a.n_rows) * n_parts;
  for (unsigned first = blockIdx.x; first < n_units; first += kPartThreads * gridDim.x) {
    const unsigned own = first + threadIdx.x * gridDim.x;
    float factor = 1;
    if (own < n_units) {
      const unsigned row = own / n_parts;
      factor = static_cast<const float*>(a.row_weights)[row];
      if (a.targets && a.targets[row] == a.ignore_index) factor = 1;
    }
    factors[threadIdx.x] = factor;
    const bool any = __any_sync(kWholeWarp, factor != 1);
    if (threadIdx.x % 32 == 0) has_work[threadIdx.x / 32] = any;
    __syncthreads();
    for (unsigned k = 0; k < kPartThreads; ++k) {
      if (!has_work[k / 32]) {
        k |= 31;
        continue;
      }
      factor = factors[k];
      if (factor == 1) continue;
      const unsigned unit = first + k * gridDim.x;
      const RowSlice<Element> row(a, RowPart<Element>(a, unit / n_parts, int(unit % n_parts)));
      VectorsAhead<Element> ahead;
      ahead.load(row, row.first + int(threadIdx.x));
      for_vectors(row, ahead, [&](int vector, uint4 bits) {
        float values[kVectorSize<Element>];
        unpack<Element>(bits, values);
#pragma unroll
        for (int i = 0; i < kVectorSize<Element>; ++i) values[i] *= factor;
        row.store(vector, pack<Element>(values));
      });
    }
    __syncthreads();
  }
}

}  // namespace ava
