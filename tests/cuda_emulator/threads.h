// What the scheduler knows: threads and what each waits for, warps, barriers, blocks. Only device.cpp includes it.
#pragma once
#include <memory>
#include <vector>

#include "../../csrc/cuda/dialect.cuh"
#include "fiber.h"
#include "shared_memory.h"

namespace cuda_emulator {

struct Block;

enum class Reason { begins, block_barrier, cluster_barrier, warp, failed, ended };

// What a thread left behind when it gave control back to the scheduler. The scheduler alone changes the device's state:
// a thread only writes here, so that ThreadSanitizer sees nothing of the emulator itself.
struct Request {
  Reason reason = Reason::begins;
  Place place;
  WarpOperation operation;
  uint32_t mask;
  uint64_t value;  // that this lane brings; after the operation, what it gets
  int source;
  const char* message;
};

// A copy under way; done when its group is waited for.
struct AsyncCopy {
  void* shared;
  const void* global;
  int bytes, group;
};

struct Thread : ThreadView {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;  // in the block
  Request request;
  std::vector<AsyncCopy> copies;
  int n_groups = 0;  // committed
};

struct Barrier {
  std::vector<Thread*> waiting;
  Sync sync;
};

// Lanes that wait for each other: those that named the same mask.
struct WarpGroup {
  uint32_t mask, arrived;
};
struct Warp {
  Thread* lanes[32] = {};
  uint32_t existing = 0;  // lanes: the last warp of a block may have fewer than 32
  std::vector<WarpGroup> groups;
  Sync sync;
};

struct Block {
  Block(size_t shared_bytes, unsigned n_threads)
      : shared(shared_bytes), warps((n_threads + 31) / 32), n_running(n_threads) {}
  SharedMemory shared;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned n_running;
  bool has_begun = false;
};

}  // namespace cuda_emulator
