// How the Python tests set up the emulated device: tests/support/emulated_cuda.py calls these by ctypes.
#include "../../csrc/cuda/dialect.cuh"

using cuda_emulator::options;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void set_schedule(int order, uint64_t seed) {
  options().order = static_cast<cuda_emulator::Order>(order);
  options().seed = seed;
}
EXPORTED void get_device(ava::DeviceLimits* limits) { *limits = options().device; }
EXPORTED void set_device(const ava::DeviceLimits* limits) { options().device = *limits; }
EXPORTED uint64_t n_launches() { return cuda_emulator::n_launches(); }
