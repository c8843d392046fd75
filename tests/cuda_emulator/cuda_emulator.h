// A CUDA device on the CPU, for tests: g++ compiles the text of the kernels in csrc/cuda as it is, and these headers
// give CUDA's names to it. No GPU, no nvcc, no toolkit. x86-64.
//
// What it models
//   threads          each is a fiber with a stack of its own. It runs until it needs the others (a barrier, a shuffle),
//                    then the scheduler picks the next one: always the first that can run (forward), the last (reverse),
//                    or any (random, by a seed). Whatever order is left open by the kernel is thus really tried.
//   barriers         __syncthreads() and cluster_sync() wait for every thread. Threads at two different barriers, or a
//                    thread that has ended, are an error that names both places.
//   mbarriers        count arrivals and bytes, phase by phase. Errors: none set up at the place, more arrivals than a
//                    phase has, an arrival though nobody has waited for the phase before.
//   warps            shuffles, votes and __syncwarp() wait for the lanes of their mask. A lane outside its own mask, and
//                    lanes of one mask in different operations, are errors; a value from outside the mask is all ones.
//   shared memory    fresh for every block, filled with nan, with red zones around each array whose bytes are compared
//                    when the block ends; AddressSanitizer sees reads beyond the end as well.
//   cp.async         the bytes arrive in wait(), not earlier; until then the place holds nan. So a missing wait shows.
//   store_async16    the bytes arrive when nothing else can go on, one store after the other (forward: the first, reverse:
//                    the last), or at any time (random); until then the place holds nan.
//   clusters         blocks of a cluster run at the same time and store into each other's shared memory. A block that has
//                    not begun must not be stored into, and none may end before what is stored into it has arrived.
//   launch limits    threads, shared memory, cluster size, as DeviceLimits says: tests set them, to reach kernels for
//                    other devices and rows of other lengths.
//   memory           under AddressSanitizer and UndefinedBehaviorSanitizer: out of bounds, alignment. ThreadSanitizer
//                    knows the fibers: two threads that touch one place without a barrier between them are a data race,
//                    named by both source lines. Barriers and __syncwarp() order memory, shuffles do not.
//
// What it does not model
//   speed; the rounding of fast-math instructions (exp2_fast is exact here); registers; atomics, and the order in which
//   weak memory becomes visible; blocks that wait for each other outside a cluster (they run one after the other, as a
//   device with one free place would); streams (a launch is over when it returns); launch bounds. __shared__ itself is
//   not there: AVA_SHARED.
//
// Files
//   cuda_emulator.h           this page, and the emulated csrc/cuda/dialect.cuh
//   emulated_types.h          keywords, dim3, uint4, __half, __nv_bfloat16
//   emulated_intrinsics.h     shuffles, votes, bits
//   emulated_primitives.h     the emulated csrc/cuda/primitives.cuh        emulated_launch.h: csrc/cuda/launch.h
//   device.h, device.cpp      the device: launches, scheduler, barriers, warps, copies; threads.h: what it keeps of each
//   shared_memory.h           the shared memory of a block, its red zones
//   fiber.h                   one flow of control: stacks, switching, what the sanitizers are told
//   python_interface.cpp      for tests/support/emulated_cuda.py, which makes the kernels operators
//   test_*.cpp                C++ tests of the device and of the kernels (schedules.h); kernels/row_sum.cuh: one that
//                             uses the whole dialect, for the tests and for tests/test_cuda_mutants.py to break
//
// Kernels want -Wno-unknown-pragmas, for #pragma unroll. device.cpp is compiled without -fsanitize=thread (it switches
// the stacks under ThreadSanitizer's feet) but with -DAVA_EMULATOR_TSAN where the rest of the program has it.
#pragma once
#ifdef __CUDACC__
#error "the emulator is for the host compiler; nvcc takes CUDA's own headers"
#endif
#include "device.h"
#include "emulated_intrinsics.h"
#include "emulated_types.h"

#define AVA_SHARED(Type, name, count) \
  static char name##_key;             \
  Type* const name = static_cast<Type*>(::cuda_emulator::static_shared(&name##_key, sizeof(Type) * (count)))
#define AVA_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_emulator::current->dynamic_shared
#define AVA_DEVICE_CHECK(condition) ((condition) ? void() : ::cuda_emulator::fail("device assert failed: " #condition))

namespace ava {

using Stream = struct EmulatedStream*;
using cuda_emulator::LaunchShape;

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape, Stream, Arguments&&... arguments) {
  // one copy of every argument for all threads: a kernel's parameters are constant memory
  cuda_emulator::run(op, shape,
                     [kernel, ... parameters = static_cast<Parameters>(arguments)] { kernel(parameters...); });
}

inline const DeviceLimits& device_limits(int) { return cuda_emulator::options().device; }

template <class... Parameters>
int resident_clusters(const char*, void (*)(Parameters...), const LaunchShape& shape) {
  return cuda_emulator::resident_clusters(shape);
}

}  // namespace ava
