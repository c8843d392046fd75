#define AVA_ISA portable
#include "vector_portable.h"
//
#include "softmax_rows_core.h"
const ava::SoftmaxRowsKernels ava::softmax_rows_portable = ava::kSoftmaxRowsKernels;
