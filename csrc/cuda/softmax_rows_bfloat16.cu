// The row kernels for logits of bfloat16.
#include "softmax_rows_launch.cuh"

const ava::SoftmaxRowsLaunchers ava::softmax_rows_bfloat16 = ava::kSoftmaxRowsLaunchers<__nv_bfloat16>;
