// What the scheduler knows: threads and what each waits for, warps, barriers, blocks. Only device.cpp includes it.
#pragma once
#include <list>
#include <memory>
#include <vector>

#include "../../csrc/cuda/dialect.cuh"
#include "fiber.h"
#include "shared_memory.h"

namespace cuda_emulator {

struct Block;

enum class Reason { begins, block_barrier, cluster_barrier, warp, mbarrier, failed, ended };
enum class MbarrierOperation { init, arrive, wait, store };

struct Mbarrier;

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
  MbarrierOperation at_mbarrier;
  void* mbarrier_place;  // of an init
  Mbarrier* mbarrier;    // of everything else
  int amount;            // arrivals; bytes; parity
  void* stores_at;
  Block* stores_in;
  uint4 stored;
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

// An object in shared memory, which is kept here: what its eight bytes hold is nobody's business.
struct Mbarrier {
  const void* place;
  int n_expected, n_pending;  // arrivals
  int n_bytes = 0;            // expected, and not arrived
  unsigned phase = 0;
  bool was_waited_for = true;  // the phase before this one
  std::vector<Thread*> waiting;
  Sync sync;
};

// Bytes on their way to another block. They arrive as late as possible, or at any time.
struct AsyncStore {
  Block* block;
  void* there;
  uint4 value;
  Mbarrier* mbarrier;
  Place place;
};

struct Block {
  Block(size_t shared_bytes, unsigned n_threads)
      : shared(shared_bytes), warps((n_threads + 31) / 32), n_running(n_threads) {}
  SharedMemory shared;
  Barrier barrier;
  std::vector<Warp> warps;
  std::list<Mbarrier> mbarriers;
  unsigned n_running;
  bool has_begun = false;
};

}  // namespace cuda_emulator
