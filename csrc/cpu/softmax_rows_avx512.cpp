#include "capability.h"
#ifdef AVA_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define AVA_ISA avx512
#include "vector_avx512.h"
//
#include "softmax_rows_kernels.h"
const ava::SoftmaxRowsKernels ava::softmax_rows_avx512 = ava::kSoftmaxRowsKernels;
#endif
