#include "capability.h"
#ifdef AVA_X86
AVA_TARGET("avx2,fma,f16c")
#define AVA_ISA avx2
#include "vector_avx2.h"
//
#include "softmax_rows_kernels.h"
const ava::SoftmaxRowsKernels ava::softmax_rows_avx2 = ava::kSoftmaxRowsKernels;
AVA_END_OF_TARGET
#endif
