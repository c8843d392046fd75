#include "gradient_pool.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>

#include "../box.h"
#include "tensors.h"

// Since torch 2.11. Weak, so that this library also loads in 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t n_dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t type,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace ava {
namespace {

constexpr int64_t kHugePage = int64_t(2) << 20, kSmallestPooled = int64_t(1) << 20;

struct Block {
  void* data;
  int64_t bytes;
  int64_t since;  // which request was the last before it became idle
};

// never destroyed: a tensor may outlive every static object
struct Pool {
  std::mutex mutex;
  Block idle[2] = {};  // most recently used first
  int64_t n_requests = 0;

  // an idle block with room for so much, or none; `dropped` gets what has been idle for too long
  Block take(int64_t bytes, Block (&dropped)[2]) {
    const std::lock_guard<std::mutex> lock(mutex);
    ++n_requests;
    Block taken = {};
    for (int i = 0; i < 2; ++i) {
      Block& block = idle[i];
      if (!taken.data && bytes > 0 && block.bytes >= bytes && block.bytes / 2 <= bytes) {  // not half a block of waste
        taken = block;
        block = {};
      } else if (block.data && n_requests - block.since > kIdleRequests) {
        dropped[i] = block;
        block = {};
      }
    }
    return taken;
  }
  Block give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex);
    block.since = n_requests;
    if (!idle[0].data) std::swap(idle[0], idle[1]);  // the more recent one is in front
    const Block dropped = idle[1];
    idle[1] = idle[0];
    idle[0] = block;
    return dropped;
  }
};
Pool& pool() {
  static Pool* const shared = new Pool;
  return *shared;
}

void release(const Block& block) {
  if (!block.data) return;
  madvise(block.data, block.bytes, MADV_DONTNEED);  // what lies within malloc's heap, it would keep
  std::free(block.data);
}

Block take(int64_t bytes) {  // 0: no block, only a request that the idle ones were of no use to
  Block dropped[2] = {};
  const Block taken = pool().take(bytes, dropped);
  for (const Block& block : dropped) release(block);
  return taken;
}

Block allocate(int64_t bytes) {
  const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, rounded);
  if (!data && free_idle_blocks() > 0) data = std::aligned_alloc(kHugePage, rounded);
  if (!data) fail_out_of_memory((std::to_string(bytes) + " bytes").c_str());
#ifdef MADV_HUGEPAGE  // Linux
  madvise(data, rounded, MADV_HUGEPAGE);  // only advice: a refusal costs time, nothing else
#endif
  return {data, rounded, 0};
}

void give_back(void* data, void* bytes) {
  release(pool().give_back({data, int64_t(reinterpret_cast<intptr_t>(bytes)), 0}));
}

}  // namespace

int64_t free_idle_blocks() {
  Block idle[2] = {};
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::swap(idle, pool().idle);
  }
  for (const Block& block : idle) release(block);
  return idle[0].bytes + idle[1].bytes;
}

Tensor pooled_empty(const TensorLayout& layout, const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  const int64_t bytes = int64_t(logits.element_size()) * layout.n_elements();
  const bool is_pooled = bytes >= kSmallestPooled && torch_from_blob;
  Block block = take(is_pooled ? bytes : 0);
  if (!is_pooled) return empty_tensor(layout, type);
  if (!block.data) block = allocate(bytes);
  AtenTensorHandle handle = nullptr;
  const auto error = torch_from_blob(block.data, int64_t(layout.sizes.size()), layout.sizes.data(),
                                     layout.strides.data(), layout.offset, shim_type(type),
                                     aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
                                     give_back, reinterpret_cast<void*>(intptr_t(block.bytes)));
  if (error != TORCH_SUCCESS) {
    give_back(block.data, reinterpret_cast<void*>(intptr_t(block.bytes)));
    fail_out_of_memory("a new tensor");
  }
  return Tensor(handle);
}

}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", AVA_BOX(&ava::free_idle_blocks));
}
