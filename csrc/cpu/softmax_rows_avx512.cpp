#include "capability.h"
#ifdef AVA_X86
AVA_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define AVA_ISA avx512
#include "vector_avx512.h"
//
#include "softmax_rows_kernels.h"
const ava::SoftmaxRowsKernels ava::softmax_rows_avx512 = ava::kSoftmaxRowsKernels;
AVA_END_OF_TARGET
#endif
