#include "capability.h"
#ifdef AVA_X86
AVA_TARGET("avx2,fma,f16c")
#define AVA_ISA avx2
#include "vector_avx2.h"
//
#include "router_rows_kernels.h"
const ava::RouterRowsKernels ava::router_rows_avx2 = ava::kRouterRowsKernels;
AVA_END_OF_TARGET
#endif
