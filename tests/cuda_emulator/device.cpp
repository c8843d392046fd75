// The emulated device: launches, the scheduler, barriers, warps. cuda_emulator.h explains the whole.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>

#include "threads.h"

namespace cuda_emulator {

ThreadView* current = nullptr;

Options& options() {
  // few multiprocessors, so that a persistent block gets several rows; the rest as on sm_90
  static Options options{Order::forward, 0, {2, 228 * 1024, 227 * 1024, 1024, 8}};
  return options;
}

namespace {

struct Failure {
  std::string message;
};

Thread& running() { return *static_cast<Thread*>(current); }

std::string text(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(place.line());
}
bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}
std::string name(const Thread& thread) {
  return "block " + std::to_string(thread.block_index.x) + " thread " + std::to_string(thread.index);
}
const char* name(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::sync: return "__syncwarp";
    case WarpOperation::shuffle: return "__shfl_sync";
    case WarpOperation::shuffle_up: return "__shfl_up_sync";
    case WarpOperation::shuffle_down: return "__shfl_down_sync";
    case WarpOperation::shuffle_xor: return "__shfl_xor_sync";
    case WarpOperation::ballot: return "__ballot_sync";
  }
  return "";
}
std::string where(const Request& request) {
  const char* what = request.reason == Reason::block_barrier     ? "__syncthreads"
                     : request.reason == Reason::cluster_barrier ? "cluster_sync"
                     : request.reason == Reason::mbarrier        ? "mbarrier_wait"
                                                                 : name(request.operation);
  return std::string(what) + " at " + text(request.place);
}

class Device {
 public:
  uint64_t n_launches = 0;

  void run(const LaunchShape& shape, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_launch(shape);
    shape_ = &shape;
    body_ = &body;
    random_ = options().seed * 0x9e3779b97f4a7c15ull | 1;
    ++n_launches;
    host_.become_current();
    const uint64_t n_clusters = uint64_t(shape.grid.x) / shape.cluster_size * shape.grid.y * shape.grid.z;
    try {
      for (uint64_t turn = 0; turn < n_clusters; ++turn) run_cluster(turn, n_clusters);
    } catch (...) {
      finish();
      for (auto& threads : threads_) threads.clear();  // some stopped in the middle of their stacks
      throw;
    }
    finish();
  }

  // From here to the next comment: on the stack of a thread.
  static void thread_main() {
    Device& device = Device::instance();
    Fiber::arrived();
    device.launch_begins_.acquire();
    (*device.body_)();
    running().request.reason = Reason::ended;
    device.launch_ends_.release();
    Fiber::switch_between(running().fiber, device.host_, true);
    std::abort();
  }
  void give_up_control() {
    launch_ends_.release();  // it may not come back: another thread can end the launch by an error
    Fiber::switch_between(running().fiber, host_);
  }
  void wait_at(Reason reason, Barrier& barrier, Place place) {
    running().request.reason = reason;
    running().request.place = place;
    barrier.sync.release();
    give_up_control();
    barrier.sync.acquire();
  }
  Barrier& cluster_barrier() { return cluster_barrier_; }
  Block* block_of_cluster(unsigned rank) { return rank < blocks_.size() ? blocks_[rank].get() : nullptr; }

  static Device& instance() {
    static Device device;
    return device;
  }

 private:
  // From here on: on the stack of the host.

  static void check_launch(const LaunchShape& shape) {
    const auto& limits = options().device;
    const auto require = [](bool condition, const std::string& message) {
      if (!condition) throw Failure{"invalid launch: " + message};
    };
    const unsigned n_threads = shape.block.x * shape.block.y * shape.block.z;
    require(n_threads >= 1 && n_threads <= 1024, "expected 1 to 1024 threads, got " + std::to_string(n_threads));
    require(shape.grid.x >= 1 && shape.grid.y >= 1 && shape.grid.z >= 1, "expected a block at least");
    require(shape.grid.x < (1u << 31) && shape.grid.y < 65536 && shape.grid.z < 65536, "too many blocks");
    require(shape.shared_bytes <= size_t(limits.shared_per_block),
            "expected at most " + std::to_string(limits.shared_per_block) + " bytes of shared memory, got " +
                std::to_string(shape.shared_bytes));
    require(shape.cluster_size >= 1 && int(shape.cluster_size) <= limits.largest_cluster,
            "expected clusters of at most " + std::to_string(limits.largest_cluster) + " blocks, got " +
                std::to_string(shape.cluster_size));
    require(shape.grid.x % shape.cluster_size == 0, "expected whole clusters along x");
  }

  uint64_t random_below(uint64_t bound) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % bound;
  }

  // Clusters are independent of each other: they run one by one, in the chosen order.
  void run_cluster(uint64_t turn, uint64_t n_clusters) {
    if (options().order == Order::random) {  // a permutation, drawn as it is used
      if (turn == 0)
        for (cluster_order_.clear(); cluster_order_.size() < n_clusters;)
          cluster_order_.push_back(cluster_order_.size());
      std::swap(cluster_order_[turn], cluster_order_[turn + random_below(n_clusters - turn)]);
    }
    const uint64_t cluster = options().order == Order::forward   ? turn
                             : options().order == Order::reverse ? n_clusters - 1 - turn
                                                                 : cluster_order_[turn];
    set_up(cluster, threads_[kThreadSanitizer ? turn % 2 : 0]);
    launch_begins_.release();
    while (n_running_ > 0) {
      if (!stores_.empty() && (ready_.empty() || (options().order == Order::random && random_below(32) == 0))) {
        deliver_store();
        continue;
      }
      if (ready_.empty()) throw Failure{describe_deadlock()};
      Thread& thread = next_thread();
      current = &thread;
      Fiber::switch_between(host_, thread.fiber);
      current = nullptr;
      answer(thread);
    }
    // to ThreadSanitizer clusters run at the same time: the same memory, given twice, would look shared by both
    if (kThreadSanitizer)
      for (auto& block : blocks_) kept_blocks_.push_back(std::move(block));
    blocks_.clear();
  }

  void set_up(uint64_t cluster, std::vector<std::unique_ptr<Thread>>& threads) {
    const unsigned n_threads = shape_->block.x * shape_->block.y * shape_->block.z, n_blocks = shape_->cluster_size;
    while (threads.size() < n_threads * n_blocks) threads.push_back(std::make_unique<Thread>());
    n_running_ = n_threads * n_blocks;
    ready_.clear();
    blocks_.clear();
    cluster_threads_.clear();
    cluster_barrier_.waiting.clear();
    stores_.clear();
    for (unsigned rank = 0; rank < n_blocks; ++rank) {
      blocks_.push_back(std::make_unique<Block>(shape_->shared_bytes, n_threads));
      for (unsigned index = 0; index < n_threads; ++index) {
        Thread& thread = *threads[rank * n_threads + index];
        place_thread(thread, cluster * n_blocks + rank, index);
        thread.cluster_rank = rank;
        thread.block = blocks_[rank].get();
        thread.dynamic_shared = thread.block->shared.dynamic();
        Warp& warp = thread.block->warps[index / 32];
        warp.lanes[index % 32] = &thread;
        warp.existing |= 1u << index % 32;
        cluster_threads_.push_back(&thread);
      }
    }
    make_ready(cluster_threads_);
  }

  void place_thread(Thread& thread, uint64_t block, unsigned index) {
    const dim3 size = shape_->block, grid = shape_->grid;
    thread.index = index;
    thread.lane = index % 32;
    thread.thread_index = {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
    thread.block_index = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                          unsigned(block / (uint64_t(grid.x) * grid.y))};
    thread.block_size = size;
    thread.grid_size = grid;
    thread.request = {};
    thread.copies.clear();
    thread.n_groups = 0;
    thread.fiber.begin_at(&Device::thread_main, index);
  }

  // ready_ is a stack: a warp goes through its shuffles while the others have not begun, as far apart as can be.
  void make_ready(const std::vector<Thread*>& threads) {
    if (options().order == Order::reverse)
      ready_.insert(ready_.end(), threads.begin(), threads.end());
    else
      ready_.insert(ready_.end(), threads.rbegin(), threads.rend());
  }
  Thread& next_thread() {
    if (options().order == Order::random) std::swap(ready_.back(), ready_[random_below(ready_.size())]);
    Thread& thread = *ready_.back();
    ready_.pop_back();
    return thread;
  }

  void answer(Thread& thread) {
    Block& block = *thread.block;
    block.has_begun = true;
    switch (thread.request.reason) {
      case Reason::begins: break;
      case Reason::block_barrier:
        return arrive(thread, block.barrier, unsigned(cluster_threads_.size() / blocks_.size()));
      case Reason::cluster_barrier: return arrive(thread, cluster_barrier_, unsigned(cluster_threads_.size()));
      case Reason::warp: return arrive(thread, block.warps[thread.index / 32]);
      case Reason::mbarrier: return operate(thread);
      case Reason::failed:
        throw Failure{std::string(thread.request.message) + " at " + text(thread.request.place) + ", " + name(thread)};
      case Reason::ended:
        --n_running_;
        if (--block.n_running > 0) return;
        if (!block.shared.red_zones_intact())
          throw Failure{"a write outside the arrays of shared memory in block " + std::to_string(thread.block_index.x)};
        for (const AsyncStore& store : stores_)
          if (store.block == &block)
            throw Failure{"store_async16 at " + text(store.place) + ": block " + std::to_string(thread.block_index.x) +
                          " has ended before the bytes arrived (a wait is missing)"};
        block.shared.end();
    }
  }

  void operate(Thread& thread) {
    const Request& request = thread.request;
    Mbarrier* const mbarrier = request.mbarrier;
    const auto require = [&](bool condition, const char* message) {
      if (!condition) throw Failure{std::string(message) + " at " + text(request.place) + ", " + name(thread)};
    };
    switch (request.at_mbarrier) {
      case MbarrierOperation::init: {
        require(request.amount > 0, "mbarrier_init: expected at least one arrival");
        Mbarrier made{};
        made.place = request.mbarrier_place;
        made.n_expected = made.n_pending = request.amount;
        thread.block->mbarriers.push_back(made);
        break;
      }
      case MbarrierOperation::arrive:
        require(mbarrier->n_pending > 0, "mbarrier_arrive_expecting: more arrivals than the phase has");
        require(mbarrier->was_waited_for, "mbarrier_arrive_expecting: nobody has waited for the phase before");
        --mbarrier->n_pending;
        mbarrier->n_bytes += request.amount;
        require(mbarrier->n_bytes < kMostBytes, "mbarrier_arrive_expecting: too many bytes");
        finish_phase(*mbarrier);
        break;
      case MbarrierOperation::wait:
        if (mbarrier->phase % 2 == unsigned(request.amount)) {
          mbarrier->waiting.push_back(&thread);
          return;
        }
        mbarrier->was_waited_for = true;
        break;
      case MbarrierOperation::store:
        stores_.push_back({request.stores_in, request.stores_at, request.stored, mbarrier, request.place});
        break;
    }
    ready_.push_back(&thread);
  }

  void finish_phase(Mbarrier& mbarrier) {
    if (mbarrier.n_pending > 0 || mbarrier.n_bytes != 0) return;
    ++mbarrier.phase;
    mbarrier.n_pending = mbarrier.n_expected;
    mbarrier.was_waited_for = !mbarrier.waiting.empty();
    make_ready(mbarrier.waiting);
    mbarrier.waiting.clear();
  }

  // No function of libc here: to ThreadSanitizer the store is what the thread did when it asked for it.
  void deliver_store() {
    const size_t which = options().order == Order::forward   ? 0
                         : options().order == Order::reverse ? stores_.size() - 1
                                                             : random_below(stores_.size());
    const AsyncStore store = stores_[which];
    stores_.erase(stores_.begin() + which);
    const uint32_t words[4] = {store.value.x, store.value.y, store.value.z, store.value.w};
    for (int i = 0; i < 4; ++i) static_cast<volatile uint32_t*>(store.there)[i] = words[i];
    store.mbarrier->n_bytes -= 16;
    if (store.mbarrier->n_bytes <= -kMostBytes)
      throw Failure{"store_async16 at " + text(store.place) + ": too many bytes"};
    finish_phase(*store.mbarrier);
  }

  void arrive(Thread& thread, Barrier& barrier, unsigned n_expected) {
    if (!barrier.waiting.empty()) {
      const Thread& first = *barrier.waiting.front();
      if (!same(first.request.place, thread.request.place))
        throw Failure{"divergent barrier: " + name(thread) + " in " + where(thread.request) + " while " + name(first) +
                      " waits in " + where(first.request)};
    }
    barrier.waiting.push_back(&thread);
    if (barrier.waiting.size() < n_expected) return;
    const auto by_index = [](const Thread* a, const Thread* b) {
      return a->cluster_rank != b->cluster_rank ? a->cluster_rank < b->cluster_rank : a->index < b->index;
    };
    std::sort(barrier.waiting.begin(), barrier.waiting.end(), by_index);
    make_ready(barrier.waiting);
    barrier.waiting.clear();
  }

  void arrive(Thread& thread, Warp& warp) {
    const Request& request = thread.request;
    const uint32_t mask = request.mask & warp.existing, bit = 1u << thread.lane;
    if (!(mask & bit)) throw Failure{where(request) + ": " + name(thread) + " is not in the mask that it names"};
    size_t at = 0;
    while (at < warp.groups.size() && warp.groups[at].mask != mask) ++at;
    if (at == warp.groups.size()) warp.groups.push_back({mask, 0});
    WarpGroup& group = warp.groups[at];
    if (group.arrived) {
      const Thread& first = *warp.lanes[__builtin_ctz(group.arrived)];
      if (first.request.operation != request.operation || !same(first.request.place, request.place))
        throw Failure{"divergent warp: " + name(thread) + " in " + where(request) + " while " + name(first) +
                      " waits in " + where(first.request)};
    }
    group.arrived |= bit;
    if (group.arrived != mask) return;
    warp.groups.erase(warp.groups.begin() + at);
    exchange(warp, mask);
  }

  void exchange(Warp& warp, uint32_t mask) {
    uint64_t brought[32], votes = 0;
    std::vector<Thread*>& lanes = lanes_;
    lanes.clear();
    for (int lane = 0; lane < 32; ++lane) {
      brought[lane] = ~uint64_t(0);
      if (!(mask >> lane & 1)) continue;
      brought[lane] = warp.lanes[lane]->request.value;
      votes |= (brought[lane] & 1) << lane;
      lanes.push_back(warp.lanes[lane]);
    }
    for (Thread* thread : lanes) {
      Request& request = thread->request;
      request.value = request.operation == WarpOperation::ballot ? votes : brought[request.source & 31];
    }
    make_ready(lanes);
  }

  std::string describe_deadlock() const {
    std::string message = "deadlock: ", last;
    unsigned n_waiting = 0, n_places = 0;
    for (const Thread* thread : cluster_threads_) {
      if (thread->request.reason == Reason::ended) continue;
      ++n_waiting;
      const std::string place = where(thread->request);
      if (place == last || ++n_places > 4) continue;
      message += name(*thread) + " waits in " + place + "; ";
      last = place;
    }
    const size_t n_ended = cluster_threads_.size() - n_waiting;
    return message + std::to_string(n_waiting) + " threads wait, " + std::to_string(n_ended) + " have ended";
  }

  void finish() {
    launch_ends_.acquire();
    current = nullptr;
    stores_.clear();
    blocks_.clear();
    kept_blocks_.clear();
  }

  std::mutex mutex_;
  Fiber host_;
  const LaunchShape* shape_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  uint64_t random_ = 1;
  std::vector<uint64_t> cluster_order_;
  // two sets for ThreadSanitizer, to whom a fiber's second block comes after its first
  std::vector<std::unique_ptr<Thread>> threads_[2];
  std::vector<std::unique_ptr<Block>> blocks_, kept_blocks_;
  std::vector<Thread*> cluster_threads_, ready_, lanes_;
  std::vector<AsyncStore> stores_;
  unsigned n_running_ = 0;
  Barrier cluster_barrier_;
  Sync launch_begins_, launch_ends_;
  static constexpr int kMostBytes = 1 << 20;  // that an mbarrier counts
};

}  // namespace

uint64_t n_launches() { return Device::instance().n_launches; }

void run(const char* op, const LaunchShape& shape, const std::function<void()>& body) {
  try {
    Device::instance().run(shape, body);
  } catch (const Failure& failure) {
    throw std::runtime_error(std::string(op) + ": CUDA emulator: " + failure.message);
  }
}

int resident_clusters(const LaunchShape& shape) {
  const auto& limits = options().device;
  const int n_threads = int(shape.block.x * shape.block.y * shape.block.z), shared = int(shape.shared_bytes);
  if (shared > limits.shared_per_block || int(shape.cluster_size) > limits.largest_cluster) return 0;
  const int per_multiprocessor =
      std::min({32, 2048 / n_threads, limits.shared_per_multiprocessor / (shared + limits.shared_reserved_per_block)});
  return std::max(1, limits.n_multiprocessors * per_multiprocessor / int(shape.cluster_size));
}

// Everything below runs on the stack of a thread.

void fail(const char* message, Place place) {
  Request& request = running().request;
  request.reason = Reason::failed;
  request.message = message;
  request.place = place;
  Device::instance().give_up_control();
  std::abort();
}

void block_barrier(Place place) { Device::instance().wait_at(Reason::block_barrier, running().block->barrier, place); }
void cluster_barrier(Place place) {
  Device::instance().wait_at(Reason::cluster_barrier, Device::instance().cluster_barrier(), place);
}

uint64_t warp_operation(WarpOperation operation, uint32_t mask, uint64_t value, int source, Place place) {
  Thread& thread = running();
  Request& request = thread.request;
  request.reason = Reason::warp;
  request.operation = operation;
  request.mask = mask;
  request.value = value;
  request.source = source;
  request.place = place;
  Sync& sync = thread.block->warps[thread.index / 32].sync;
  if (operation == WarpOperation::sync) sync.release();  // shuffles order no memory
  Device::instance().give_up_control();
  if (operation == WarpOperation::sync) sync.acquire();
  return request.value;
}

void* static_shared(const void* key, size_t bytes) {
  void* const array = running().block->shared.array(key, bytes);
  require(array, "expected at most 48 KB in at most 64 arrays of AVA_SHARED");
  return array;
}

void* map_shared(void* pointer, unsigned rank, Place place) {
  const Block* const other = Device::instance().block_of_cluster(rank);
  require(other, "store_async16: expected a rank below the size of the cluster", place);
  require(running().block->shared.has_dynamic(pointer), "store_async16: expected a place in dynamic shared memory",
          place);
  require(other->has_begun, "store_async16: the other block has not begun (a cluster_sync is missing before)", place);
  require(other->n_running > 0, "store_async16: the other block has ended (it has to wait for the bytes)", place);
  return other->shared.dynamic() + (static_cast<unsigned char*>(pointer) - running().dynamic_shared);
}

static Request& request_at_mbarrier(MbarrierOperation operation, Block& block, void* place_of_mbarrier, int amount,
                                    Place place) {
  Mbarrier* found = nullptr;
  for (Mbarrier& mbarrier : block.mbarriers)
    if (mbarrier.place == place_of_mbarrier) found = &mbarrier;
  require(!found == (operation == MbarrierOperation::init),
          found ? "mbarrier_init: there is an mbarrier already"
                : "expected an mbarrier: nobody has set one up here (or a cluster_sync is missing)",
          place);
  Request& request = running().request;
  request.reason = Reason::mbarrier;
  request.place = place;
  request.at_mbarrier = operation;
  request.mbarrier_place = place_of_mbarrier;
  request.mbarrier = found;
  request.amount = amount;
  return request;
}

void init_mbarrier(void* mbarrier, int n_arrivals, Place place) {
  request_at_mbarrier(MbarrierOperation::init, *running().block, mbarrier, n_arrivals, place);
  Device::instance().give_up_control();
}

void arrive_at_mbarrier(void* mbarrier, int n_bytes, Place place) {
  request_at_mbarrier(MbarrierOperation::arrive, *running().block, mbarrier, n_bytes, place).mbarrier->sync.release();
  Device::instance().give_up_control();
}

void wait_at_mbarrier(void* mbarrier, unsigned parity, Place place) {
  require(parity < 2, "mbarrier_wait: expected a parity of 0 or 1", place);
  Sync& sync =
      request_at_mbarrier(MbarrierOperation::wait, *running().block, mbarrier, int(parity), place).mbarrier->sync;
  Device::instance().give_up_control();
  sync.acquire();
}

void store_async(void* there, uint4 value, void* mbarrier, unsigned rank, Place place) {
  require(Device::instance().block_of_cluster(1), "store_async16: expected a cluster of several blocks", place);
  Block& block = *Device::instance().block_of_cluster(rank);
  Request& request = request_at_mbarrier(MbarrierOperation::store, block, mbarrier, 0, place);
  request.stores_at = there;
  request.stores_in = &block;
  request.stored = value;
  request.mbarrier->sync.release();
  Device::instance().give_up_control();
}

void copy_async(void* shared, const void* global, int bytes, Place) {
  Thread& thread = running();
  static_cast<void>(*static_cast<const volatile char*>(global));  // AddressSanitizer looks at both ends here, with the
  static_cast<void>(static_cast<const volatile char*>(global)[bytes - 1]);  // kernel's line in its report
  std::memset(shared, 0xff, bytes);
  thread.copies.push_back({shared, global, bytes, thread.n_groups});
}
void commit_copies() { ++running().n_groups; }
void wait_for_copies(int n_pending) {
  Thread& thread = running();
  const auto is_due = [&](const AsyncCopy& copy) {
    if (copy.group >= thread.n_groups - n_pending) return false;
    std::memcpy(copy.shared, copy.global, copy.bytes);
    return true;
  };
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), is_due), thread.copies.end());
}

}  // namespace cuda_emulator
