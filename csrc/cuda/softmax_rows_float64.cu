// The row kernels for logits of float64.
#include "softmax_rows_arguments.h"
#include "softmax_rows_scalar.cuh"

namespace ava {

__global__ void __launch_bounds__(kScalarThreads) scale_double_rows_kernel(const RowArguments a) {
  const double factor = static_cast<const double*>(a.row_weights)[blockIdx.x];
  if (factor == 1 || (a.targets && a.targets[blockIdx.x] == a.ignore_index)) return;
  double* const out = static_cast<double*>(a.grad_logits) + row_offset(a.grad_layout, uint32_t(blockIdx.x));
  for (int column = threadIdx.x; column < a.n_columns; column += kScalarThreads) out[column] *= factor;
}

namespace {

void row_loss(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  launch_scalar_rows<double>(op, arguments, false, stream);
}
void row_gradient(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  launch_scalar_rows<double>(op, arguments, true, stream);
}
void scale_rows(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_rows));
  shape.block = dim3(kScalarThreads);
  launch(op, scale_double_rows_kernel, shape, stream, arguments);
}

}  // namespace
}  // namespace ava

const ava::SoftmaxRowsLaunchers ava::softmax_rows_float64 = {ava::row_loss, ava::row_loss, ava::row_gradient,
                                                             ava::scale_rows};
