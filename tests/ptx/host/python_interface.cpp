// How tests/ptx/cuda_operators.py sets this up, by ctypes.
#include "../../../csrc/cuda/dialect.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

ptx_host::RunKernel ptx_host::run_kernel = nullptr;

EXPORTED void set_run_kernel(ptx_host::RunKernel run) { ptx_host::run_kernel = run; }
EXPORTED void set_device(const ava::DeviceLimits* limits) { cuda_emulator::options().device = *limits; }
