#include "gradient_pool.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

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
};

// never destroyed: a tensor may outlive every static object
struct Pool {
  std::mutex mutex;
  Block idle[2] = {};  // most recently used first
};
Pool& pool() {
  static Pool* const shared = new Pool;
  return *shared;
}

Block take(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (Block& block : pool().idle)
      if (block.bytes >= bytes && block.bytes / 2 <= bytes) {  // not half a block of waste
        const Block taken = block;
        block = {};
        return taken;
      }
  }
  const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, rounded);
  if (!data) throw std::bad_alloc();
  madvise(data, rounded, MADV_HUGEPAGE);  // only advice: a refusal costs time, nothing else
  return {data, rounded};
}

void give_back(void* data, void* bytes) {
  Block block{data, int64_t(reinterpret_cast<intptr_t>(bytes))}, dropped;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    Block(&idle)[2] = pool().idle;
    if (!idle[0].data) std::swap(idle[0], idle[1]);  // the more recent one is in front
    dropped = idle[1];
    idle[1] = idle[0];
    idle[0] = block;
  }
  std::free(dropped.data);
}

}  // namespace

torch::stable::Tensor pooled_empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type,
                                   int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kSmallestPooled || !torch_from_blob) return empty_tensor(sizes, type);
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  const Block block = take(bytes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block.data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, shim_type(type), aoti_torch_device_type_cpu(),
      -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(intptr_t(block.bytes))));
  return torch::stable::Tensor(handle);
}

}  // namespace ava
