// The row kernels for logits of float64.
#include "softmax_rows_arguments.h"
#include "softmax_rows_double.cuh"

namespace ava {
namespace {

LaunchShape shape_of_rows(const RowArguments& arguments) {
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_rows));
  shape.block = dim3(kDoubleThreads);
  shape.shared_bytes = sizeof(RowScratch<double>) + size_t(arguments.n_ids + 1) * sizeof(SparseEntry<double>);
  return shape;
}
void row_loss(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  launch(op, double_rows_kernel, shape_of_rows(arguments), stream, arguments, false);
}
void row_gradient(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  launch(op, double_rows_kernel, shape_of_rows(arguments), stream, arguments, true);
}
void scale_rows(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  launch(op, scale_double_rows_kernel, shape_of_rows(arguments), stream, arguments);
}

}  // namespace
}  // namespace ava

const ava::SoftmaxRowsLaunchers ava::softmax_rows_float64 = {ava::row_loss, ava::row_loss, ava::row_gradient,
                                                             ava::scale_rows};
