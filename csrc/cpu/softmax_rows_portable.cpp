#define AVA_ISA portable
#include "vector_portable.h"
//
#include "softmax_rows_kernels.h"
const ava::SoftmaxRowsKernels ava::softmax_rows_portable = ava::kSoftmaxRowsKernels;
