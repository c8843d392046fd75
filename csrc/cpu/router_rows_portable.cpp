#define AVA_ISA portable
#include "vector_portable.h"
//
#include "router_rows_kernels.h"
const ava::RouterRowsKernels ava::router_rows_portable = ava::kRouterRowsKernels;
