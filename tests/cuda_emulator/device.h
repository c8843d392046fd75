// What kernel text asks of the emulated device. cuda_emulator.h explains the whole; csrc/cuda/dialect.cuh, which has
// DeviceLimits, includes it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include "emulated_types.h"

namespace cuda_emulator {

using Place = std::source_location;  // of a barrier or a shuffle, for the reports

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;    // dynamic
  unsigned cluster_size = 1;  // blocks, along x; divides grid.x
};

// Which of the threads that can run comes next.
enum class Order { forward, reverse, random };

struct Options {
  Order order = Order::forward;
  uint64_t seed = 0;
  ava::DeviceLimits device;
};
Options& options();

uint64_t n_launches();  // since the program began

// The running CUDA thread, as its kernel sees itself.
struct ThreadView {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  unsigned lane;
  unsigned cluster_rank;
  unsigned char* dynamic_shared;
};
extern ThreadView* current;

// Runs `body` once per thread. Throws std::runtime_error with what the device found wrong.
void run(const char* op, const LaunchShape& shape, const std::function<void()>& body);
int resident_clusters(const LaunchShape& shape);

[[noreturn]] void fail(const char* message, Place place = Place::current());
inline void require(bool condition, const char* message, Place place = Place::current()) {
  if (!condition) fail(message, place);
}

void block_barrier(Place place);
void cluster_barrier(Place place);

enum class WarpOperation { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot };
// Waits for the lanes of `mask`. Returns what lane `source` brought (all ones where it is not in the mask); of a ballot
// the bits of all lanes.
uint64_t warp_operation(WarpOperation operation, uint32_t mask, uint64_t value, int source, Place place);

void* static_shared(const void* key, size_t bytes);  // a shared array of this block
void* map_shared(void* pointer, unsigned rank, Place place);

// Of this thread's block; a store is counted at the mbarrier of block `rank`, where its place is too.
void init_mbarrier(void* mbarrier, int n_arrivals, Place place);
void arrive_at_mbarrier(void* mbarrier, int n_bytes, Place place);
void wait_at_mbarrier(void* mbarrier, unsigned parity, Place place);
void store_async(void* there, uint4 value, void* mbarrier, unsigned rank, Place place);

void copy_async(void* shared, const void* global, int bytes, Place place);
void commit_copies();
void wait_for_copies(int n_pending);

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::current->thread_index)
#define blockIdx (::cuda_emulator::current->block_index)
#define blockDim (::cuda_emulator::current->block_size)
#define gridDim (::cuda_emulator::current->grid_size)
