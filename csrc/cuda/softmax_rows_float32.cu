// The row kernels for logits of float32.
#include "softmax_rows_launch.cuh"

const ava::SoftmaxRowsLaunchers ava::softmax_rows_float32 = ava::kSoftmaxRowsLaunchers<float>;
