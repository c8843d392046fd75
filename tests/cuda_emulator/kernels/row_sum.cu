// nvcc compiles what the emulator runs.
#include "row_sum.cuh"

template void ava::row_sum(const float*, float*, int, int, ava::Stream);
template void ava::row_sum(const __half*, float*, int, int, ava::Stream);
template void ava::row_sum(const __nv_bfloat16*, float*, int, int, ava::Stream);
