// Rows of float64: one block for a row, one column after another, the scalar text of softmax_rows.h. Right rather than
// fast; it is what gradcheck runs through.
#pragma once
#include "softmax_rows_measure.cuh"
#include "softmax_rows_sparse.cuh"

namespace ava {

constexpr int kDoubleThreads = 256;

__device__ __forceinline__ double double_logit(const RowArguments& a, const RowOptions<double>& options, double x) {
  return (a.flags & kSoftcap) && x != -INFINITY ? options.softcap * tanh(x * (1 / options.softcap)) : x;
}

// `given`: statistics and coefficients come from outside (row_gradient), else from here (row_loss, row_statistics)
__global__ void __launch_bounds__(kDoubleThreads) double_rows_kernel(const RowArguments a, bool given) {
  AVA_DYNAMIC_SHARED(shared);
  AVA_SHARED(RowStatistics<double>, partials, kDoubleThreads / 32);
  auto* const scratch = reinterpret_cast<RowScratch<double>*>(shared);
  auto* const entries = reinterpret_cast<SparseEntry<double>*>(scratch + 1);  // [1 + n_ids]
  const int64_t row_index = blockIdx.x;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const RowOptions<double> options = *static_cast<const RowOptions<double>*>(a.options);
  const double inverse_temperature = 1 / options.temperature;
  const auto* const x = static_cast<const double*>(a.logits) + row_offset(a.logits_layout, uint32_t(row_index));
  double* const out =
      a.grad_logits ? static_cast<double*>(a.grad_logits) + row_offset(a.grad_layout, uint32_t(row_index)) : nullptr;
  const auto* const statistics = static_cast<const RowStatistics<double>*>(a.statistics);
  const int32_t target = given ? 0 : counted_target(a, row_index);
  if (given ? statistics[row_index].count == 0 : target < 0) {
    for (int column = thread; out && column < a.n_columns; column += kDoubleThreads) out[column] = 0;
    if (warp == 0 && !given) write_nothing<double>(a, row_index, lane);
    return;
  }

  if (!given) {
    RowStatistics<double> partial = empty_statistics<double>();
    for (int column = thread; column < a.vocab_size; column += kDoubleThreads)
      partial = update(partial, double_logit(a, options, x[column]), column, inverse_temperature);
    partial = merge_lanes(partial, inverse_temperature);
    if (lane == 0) partials[warp] = partial;
  }
  __syncthreads();
  if (warp == 0) {
    RowStatistics<double> row;
    if (given) {
      row = statistics[row_index];
    } else {
      row = lane < kDoubleThreads / 32 ? partials[lane] : empty_statistics<double>();
      row = finished(merge_lanes(row, inverse_temperature), true);
    }
    const int32_t argmax = row.argmax < double(a.vocab_size) ? int32_t(row.argmax) : -1;
    for (int k = lane; k <= a.n_ids; k += 32)
      entries[k] = gathered<double>(a, row_index,
                                    given       ? argmax
                                    : a.targets ? target
                                                : -1,
                                    k, [&](int column) { return x[column]; });
    __syncwarp();
    if (given)
      take_coefficients(a, options, row_index, row, entries, scratch, lane);
    else if (a.summaries)
      write_summaries(a, options, row_index, row, entries, lane);
    else
      evaluate_row(a, options, weight_of<double>(a, row_index), row, entries, scratch, lane);
    __syncwarp();
    if (a.row_loss) write_loss(a, row_index, weight_of<double>(a, row_index), entries, scratch, lane);
  }
  if (!out) return;
  __syncthreads();
  const RowStatistics<double> row = scratch->statistics;
  const DenseGradient<double> dense = scratch->dense;
  for (int column = thread; column < a.n_columns; column += kDoubleThreads) {
    double gradient = 0;
    if (row.count != 0 && column < a.vocab_size && x[column] != -INFINITY) {
      const double difference = double_logit(a, options, x[column]) - row.max;
      const double lowest = lowest_u<double>() * options.temperature,
                   bounded = difference < lowest ? lowest : difference;
      gradient = exp(difference * inverse_temperature) * (dense.factor + dense.slope * bounded) + dense.constant;
      gradient *= scalar_cap_slope(a, options, x[column]);
    }
    out[column] = gradient;
  }
  __syncthreads();
  if (warp == 0)
    write_entries(
        a, options, entries, scratch, lane, [](int) { return true; },
        [&](int column, double value) { out[column] = value; });
}

__global__ void __launch_bounds__(kDoubleThreads) scale_double_rows_kernel(const RowArguments a) {
  const double factor = static_cast<const double*>(a.row_weights)[blockIdx.x];
  if (factor == 1 || (a.targets && a.targets[blockIdx.x] == a.ignore_index)) return;
  double* const out = static_cast<double*>(a.grad_logits) + row_offset(a.grad_layout, uint32_t(blockIdx.x));
  for (int column = threadIdx.x; column < a.n_columns; column += kDoubleThreads) out[column] *= factor;
}

}  // namespace ava
