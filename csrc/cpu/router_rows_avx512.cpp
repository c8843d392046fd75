#include "capability.h"
#ifdef AVA_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define AVA_ISA avx512
#include "vector_avx512.h"
//
#include "router_rows_kernels.h"
const ava::RouterRowsKernels ava::router_rows_avx512 = ava::kRouterRowsKernels;
#endif
