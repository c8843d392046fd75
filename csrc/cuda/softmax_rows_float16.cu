// The row kernels for logits of float16.
#include "softmax_rows_launch.cuh"

const ava::SoftmaxRowsLaunchers ava::softmax_rows_float16 = ava::kSoftmaxRowsLaunchers<__half>;
