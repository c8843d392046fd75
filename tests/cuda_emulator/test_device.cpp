// The emulated device itself: what it computes, and what it reports.
#include <memory>
#include <vector>

#include "../../csrc/cuda/primitives.cuh"
#include "schedules.h"

using namespace ava;

__global__ void index_kernel(int* out) {  // [grid, block]
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * int(blockDim.x * blockDim.y * blockDim.z) + thread] += block * 1000 + thread;
}
static void test_every_thread_runs_once() {
  cuda_emulator::under_every_schedule([] {
    std::vector<int> out(2 * 3 * 2 * 24, 0);
    launch("test", index_kernel, {dim3(2, 3, 2), dim3(4, 3, 2)}, nullptr, out.data());
    for (int i = 0; i < int(out.size()); ++i) EXPECT_CLOSE(out[i], i / 24 * 1000 + i % 24, 0);
  });
}

__global__ void shuffle_kernel(int* out) {  // [7, 32]
  const int lane = threadIdx.x;
  out[0 * 32 + lane] = __shfl_sync(kWholeWarp, lane, lane + 5);
  out[1 * 32 + lane] = __shfl_sync(kWholeWarp, lane, 3);
  out[2 * 32 + lane] = __shfl_xor_sync(kWholeWarp, lane, 6);
  out[3 * 32 + lane] = __shfl_up_sync(kWholeWarp, lane, 3);
  out[4 * 32 + lane] = __shfl_down_sync(kWholeWarp, lane, 3);
  out[5 * 32 + lane] = int(__ballot_sync(kWholeWarp, lane % 3 == 0));
  out[6 * 32 + lane] = __any_sync(kWholeWarp, lane == 9) + 2 * __all_sync(kWholeWarp, lane < 31);
}
static void test_shuffles_and_votes() {
  cuda_emulator::under_every_schedule([] {
    std::vector<int> out(7 * 32);
    launch("test", shuffle_kernel, {dim3(1), dim3(32)}, nullptr, out.data());
    for (int lane = 0; lane < 32; ++lane) {
      EXPECT_CLOSE(out[lane], (lane + 5) % 32, 0);
      EXPECT_CLOSE(out[32 + lane], 3, 0);
      EXPECT_CLOSE(out[64 + lane], lane ^ 6, 0);
      EXPECT_CLOSE(out[96 + lane], lane < 3 ? lane : lane - 3, 0);
      EXPECT_CLOSE(out[128 + lane], lane < 29 ? lane + 3 : lane, 0);
      EXPECT_CLOSE(out[160 + lane], 0x49249249, 0);
      EXPECT_CLOSE(out[192 + lane], 1, 0);
    }
  });
}

__global__ void half_warps_kernel(int* out) {  // [48]
  // two groups of lanes that need not meet, and a last warp of 16
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = int(threadIdx.x);
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
  out[threadIdx.x] = sum;
}
static void test_masks() {
  cuda_emulator::under_every_schedule([] {
    std::vector<int> out(48);
    launch("test", half_warps_kernel, {dim3(1), dim3(48)}, nullptr, out.data());
    for (int thread = 0; thread < 48; ++thread) EXPECT_CLOSE(out[thread], 120 + thread / 16 * 256, 0);
  });
}

__global__ void barrier_kernel(const int* in, int* out, int n_rounds) {  // in, out: [gridDim.x, 64]
  AVA_SHARED(int, values, 64);
  AVA_SHARED(int, other, 64);
  values[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  for (int round = 0; round < n_rounds; ++round) {  // each round turns the values by one
    __syncthreads();
    other[threadIdx.x] = values[(threadIdx.x + 1) % 64];
    __syncthreads();
    values[threadIdx.x] = other[threadIdx.x];
  }
  out[blockIdx.x * 64 + threadIdx.x] = values[threadIdx.x];
}
static void test_barriers_and_arrays() {
  cuda_emulator::under_every_schedule([] {
    std::vector<int> in(5 * 64), out(5 * 64);
    for (int i = 0; i < 5 * 64; ++i) in[i] = i;
    launch("test", barrier_kernel, {dim3(5), dim3(64)}, nullptr, in.data(), out.data(), 7);
    for (int i = 0; i < 5 * 64; ++i) EXPECT_CLOSE(out[i], i / 64 * 64 + (i + 7) % 64, 0);
  });
}

template <int kPending>
__global__ void copies_kernel(const uint4* in, uint4* out) {  // [3] both
  AVA_SHARED(uint4, staged, 3);
  for (int i = 0; i < 3; ++i) {
    cp_async16(staged + i, in + i);
    if (i < 2) cp_async_commit();
  }
  cp_async_wait<kPending>();  // of the two groups that are closed
  for (int i = 0; i < 3; ++i) out[i] = staged[i];
}
static void test_copies_arrive_when_they_are_waited_for() {
  const std::vector<uint4> in = {{1, 1, 1, 1}, {2, 2, 2, 2}, {3, 3, 3, 3}};
  std::vector<uint4> out(3);
  launch("test", copies_kernel<0>, {dim3(1), dim3(1)}, nullptr, in.data(), out.data());
  EXPECT(out[0].x == 1 && out[1].w == 2 && out[2].y == 0xffffffffu);
  launch("test", copies_kernel<1>, {dim3(1), dim3(1)}, nullptr, in.data(), out.data());
  EXPECT(out[0].x == 1 && out[1].w == 0xffffffffu && out[2].y == 0xffffffffu);
  launch("test", copies_kernel<2>, {dim3(1), dim3(1)}, nullptr, in.data(), out.data());
  EXPECT(out[0].x == 0xffffffffu);
}

constexpr int kRounds = 7;
struct Mailbox {  // in dynamic shared memory
  uint4 of_blocks[2][4];
  uint64_t mbarriers[2];
};
__global__ void cluster_kernel(int* out) {  // [kRounds, gridDim.x]
  AVA_DYNAMIC_SHARED(shared);
  Mailbox* const mine = reinterpret_cast<Mailbox*>(shared);
  const unsigned rank = cluster_rank();
  if (threadIdx.x < 2) mbarrier_init(mine->mbarriers + threadIdx.x, 1);
  cluster_sync();
  for (unsigned round = 0; round < kRounds; ++round) {  // every block hands a number to every one
    uint4* const now = mine->of_blocks[round % 2];
    uint64_t* const mbarrier = mine->mbarriers + round % 2;
    if (threadIdx.x < 4) store_async16(now + rank, {blockIdx.x + round, 0, 0, 7}, mbarrier, threadIdx.x);
    if (threadIdx.x == 9) mbarrier_arrive_expecting(mbarrier, 4 * 16);  // the bytes may be there already
    mbarrier_wait(mbarrier, round / 2 % 2);
    if (threadIdx.x == 0)
      out[round * gridDim.x + blockIdx.x] = int(now[0].x + 10 * now[1].x + 100 * now[2].x + 1000 * now[3].x * now[3].w);
    __syncwarp();
  }
}
static LaunchShape cluster_shape(unsigned n_blocks) {
  LaunchShape shape{dim3(n_blocks), dim3(32)};
  shape.shared_bytes = sizeof(Mailbox);
  shape.cluster_size = 4;
  return shape;
}
static void test_clusters() {
  cuda_emulator::under_every_schedule([] {
    std::vector<int> out(kRounds * 8);
    launch("test", cluster_kernel, cluster_shape(8), nullptr, out.data());
    for (int round = 0; round < kRounds; ++round)
      for (int block = 0; block < 8; ++block)
        EXPECT_CLOSE(out[round * 8 + block], (block < 4 ? 21210 : 49654) + 7111 * round, 0);
  });
}

// What is wrong has to be reported, with its place.

__global__ void early_exit_kernel() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void lone_lane_kernel() {
  if (threadIdx.x == 3) return;
  __shfl_xor_sync(kWholeWarp, 1, 1);
}
__global__ void wrong_mask_kernel() { __shfl_xor_sync(0x0000ffffu, 1, 1); }
__global__ void two_operations_kernel() {
  if (threadIdx.x < 16)
    __shfl_xor_sync(kWholeWarp, 1, 1);
  else
    __ballot_sync(kWholeWarp, true);
}
__global__ void check_kernel(int n) { AVA_DEVICE_CHECK(int(threadIdx.x) < n); }
__global__ void unaligned_kernel(char* bytes) { store16(bytes + 4, {}); }
// A cluster of four blocks in which something about its mbarriers is wrong.
enum Mistake { kNoSync, kNotSetUp, kTwice, kEarly, kTooMany, kEnded, kBytes, kArrivals, kPast };
template <Mistake kMistake>
__global__ void mistaken_kernel(unsigned* out) {
  AVA_DYNAMIC_SHARED(shared);
  Mailbox* const mine = reinterpret_cast<Mailbox*>(shared);
  uint64_t* const mbarrier = mine->mbarriers;
  const unsigned rank = cluster_rank();
  uint4* const slot = mine->of_blocks[0] + rank;
  if (threadIdx.x == 0) mbarrier_init(mbarrier, 2);
  if (kMistake == kTwice && threadIdx.x == 0) mbarrier_init(mbarrier, 2);
  if (kMistake != kNoSync) cluster_sync();
  if (threadIdx.x > 0) return;
  if (kMistake == kPast) return store_async16(slot, {}, mbarrier, 4);
  store_async16(slot, {rank, 0, 0, 0}, mbarrier + (kMistake == kNotSetUp), (rank + 1) % 4);
  if (kMistake == kEnded) return;
  mbarrier_arrive_expecting(mbarrier, kMistake == kBytes ? 32 : 16);
  if (kMistake != kArrivals) mbarrier_arrive_expecting(mbarrier, 0);
  if (kMistake == kTooMany) mbarrier_arrive_expecting(mbarrier, 16);
  if (kMistake != kEarly) mbarrier_wait(mbarrier, 0);
  out[rank] = mine->of_blocks[0][(rank + 3) % 4].x;
  if (kMistake == kEarly) mbarrier_wait(mbarrier, 0);
}
__global__ void phase_that_nobody_saw_kernel() {
  AVA_SHARED(uint64_t, mbarrier, 1);
  mbarrier_init(mbarrier, 1);
  mbarrier_arrive_expecting(mbarrier, 0);
  mbarrier_arrive_expecting(mbarrier, 0);
}
__global__ void past_the_end_kernel(int n) {
  AVA_SHARED(int, values, 8);
  AVA_DYNAMIC_SHARED(shared);
  (n > 0 ? values : reinterpret_cast<int*>(shared) + 8)[n > 0 ? n : -n] = 1;
}

static void test_reports() {
  unsigned out[4] = {};
  using cuda_emulator::Order;
  for (Order order : {Order::forward, Order::reverse, Order::random}) {
    cuda_emulator::options().order = order;
    const LaunchShape two_warps{dim3(2), dim3(64)}, one_warp{dim3(1), dim3(32)};
    EXPECT_REPORT(launch("an_op", early_exit_kernel, two_warps, nullptr), "an_op: CUDA emulator: deadlock: block ",
                  " waits in __syncthreads at test_device.cpp:", "40 threads wait, 24 have ended");
    EXPECT_REPORT(launch("an_op", two_barriers_kernel, two_warps, nullptr), "divergent barrier: block ",
                  "in __syncthreads at test_device.cpp:", "waits in __syncthreads at test_device.cpp:");
    EXPECT_REPORT(launch("an_op", lone_lane_kernel, one_warp, nullptr), "deadlock", "__shfl_xor_sync at test_device",
                  "31 threads wait, 1 have ended");
    EXPECT_REPORT(launch("an_op", wrong_mask_kernel, one_warp, nullptr), "is not in the mask that it names");
    EXPECT_REPORT(launch("an_op", two_operations_kernel, one_warp, nullptr), "divergent warp", "__shfl_xor_sync at",
                  "__ballot_sync at");
    EXPECT_REPORT(launch("an_op", check_kernel, one_warp, nullptr, 31), "device assert failed: int(threadIdx.x) < n",
                  "block 0 thread 31");
    alignas(16) char bytes[32];
    EXPECT_REPORT(launch("an_op", unaligned_kernel, one_warp, nullptr, bytes), "store16: expected an address aligned");
    const LaunchShape cluster = cluster_shape(4);
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kNoSync>, cluster, nullptr, out), "a cluster_sync is missing");
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kNotSetUp>, cluster, nullptr, out), "nobody has set one up",
                  "test_device.cpp:");
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kTwice>, cluster, nullptr, out), "there is an mbarrier already");
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kEnded>, cluster, nullptr, out), "has ended");
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kBytes>, cluster, nullptr, out), "deadlock",
                  "waits in mbarrier_wait");
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kArrivals>, cluster, nullptr, out), "deadlock",
                  "waits in mbarrier_wait");
    EXPECT_REPORT(launch("an_op", mistaken_kernel<kPast>, cluster, nullptr, out), "a rank below the size");
  }
  cuda_emulator::options().order = Order::forward;
#ifndef __SANITIZE_THREAD__  // which reports the read
  launch("an_op", mistaken_kernel<kEarly>, cluster_shape(4), nullptr, out);
  EXPECT(out[0] == 0xffffffffu);  // bytes arrive as late as they may
#endif
  EXPECT_REPORT(launch("an_op", mistaken_kernel<kTooMany>, cluster_shape(4), nullptr, out), "more arrivals");
  EXPECT_REPORT(launch("an_op", phase_that_nobody_saw_kernel, {dim3(1), dim3(1)}, nullptr), "nobody has waited");
#ifndef __SANITIZE_ADDRESS__  // which ends the program at the write
  const LaunchShape with_shared{dim3(1), dim3(1), 32};
  for (int n : {8, 12, 20, 0, -3, -9})
    EXPECT_REPORT(launch("an_op", past_the_end_kernel, with_shared, nullptr, n),
                  "a write outside the arrays of shared");
#endif
}

static void test_limits_of_a_launch() {
  std::vector<int> out(kRounds * 8);
  const auto try_shape = [&](LaunchShape shape) { launch("an_op", cluster_kernel, shape, nullptr, out.data()); };
  EXPECT_REPORT(try_shape({dim3(1), dim3(1025)}), "expected 1 to 1024 threads, got 1025");
  EXPECT_REPORT(try_shape({dim3(0), dim3(32)}), "expected a block at least");
  EXPECT_REPORT(try_shape({dim3(1), dim3(32), 227 * 1024 + 1}), "expected at most 232448 bytes of shared memory");
  EXPECT_REPORT(try_shape({dim3(6), dim3(32), 16, 4}), "expected whole clusters");
  EXPECT_REPORT(try_shape({dim3(16), dim3(32), 16, 16}), "expected clusters of at most 8 blocks, got 16");
  // 228 KB hold two blocks of 100 KB, with what the system keeps of each; 2 multiprocessors
  EXPECT_CLOSE(resident_clusters("an_op", cluster_kernel, {dim3(1), dim3(256), 100 * 1024}), 4, 0);
  EXPECT_CLOSE(resident_clusters("an_op", cluster_kernel, {dim3(2), dim3(256), 100 * 1024, 2}), 2, 0);
  EXPECT_CLOSE(resident_clusters("an_op", cluster_kernel, {dim3(1), dim3(1024)}), 4, 0);
}

int main() {
  test_every_thread_runs_once();
  test_shuffles_and_votes();
  test_masks();
  test_barriers_and_arrays();
  test_copies_arrive_when_they_are_waited_for();
  test_clusters();
  test_reports();
  test_limits_of_a_launch();
  test_clusters();  // also after launches that stopped in the middle
  return expect::exit_code();
}
