// The row family on the CPU: memory and threads. The operators are in ../softmax_rows_operators.h, the arithmetic is in
// softmax_rows_kernels.h.
#include "../softmax_rows_operators.h"

#include <algorithm>
#include <atomic>

#include "capability.h"
#include "gradient_pool.h"
#include "softmax_rows_arguments.h"
#include "tensors.h"

namespace ava {
namespace {

const SoftmaxRowsKernels& kernels() {
#ifdef AVA_X86
  switch (cpu_capability()) {
    case CpuCapability::avx512: return softmax_rows_avx512;
    case CpuCapability::avx2: return softmax_rows_avx2;
    default: break;
  }
#endif
  return softmax_rows_portable;
}

// Threads of torch's own pool, so that torch.set_num_threads holds here too, take a few rows at a time: rows that do
// not count cost little, and may all be in one place.
void for_rows(SoftmaxRowsKernel kernel, const SoftmaxRowsArguments& arguments) {
  const int64_t rows_at_once = std::max<int64_t>(1, (int64_t(1) << 18) / arguments.n_columns);
  const int64_t n_pieces = (arguments.n_rows + rows_at_once - 1) / rows_at_once;
  const int64_t n_threads = std::min<int64_t>(n_pieces, torch::stable::get_num_threads());
  std::atomic<int64_t> next_piece{0};
  const auto work = [&](int64_t, int64_t) {
    std::vector<char> scratch(sparse_scratch_bytes(arguments.n_ids));
    for (int64_t piece; (piece = next_piece.fetch_add(1)) < n_pieces;)
      kernel(arguments, piece * rows_at_once, std::min(arguments.n_rows, (piece + 1) * rows_at_once), scratch.data());
  };
  if (n_threads == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, n_threads, 1, work);
}

struct CpuRows {
  using Arguments = SoftmaxRowsArguments;
  using Kernels = SoftmaxRowsKernels;

  static void check_size(const char*, int64_t, int64_t) {}
  static void check_n_ids(const char*, int64_t) {}
  static void check_range(const char* op, const char* name, const Tensor& dense_ids, int64_t vocab_size,
                          int64_t absent) {
    const int64_t n = dense_ids.numel();
    const bool wide = dense_ids.scalar_type() == ScalarType::Long;
    const auto* longs = static_cast<const int64_t*>(wide ? dense_ids.const_data_ptr() : nullptr);
    const auto* ints = static_cast<const int32_t*>(wide ? nullptr : dense_ids.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = wide ? longs[i] : ints[i];
      if ((id < 0 || id >= vocab_size) && id != absent)
        fail_index(op, ": expected ", name, " in [0, ", vocab_size, ") or ", absent, ", got ", id, " at position ", i);
    }
  }
  static Tensor new_tensor(const Tensor&, const std::vector<int64_t>& sizes, ScalarType type) {
    return empty_tensor(sizes, type);
  }
  static Tensor new_gradient(const Tensor& logits) {
    return pooled_empty(shape_of(logits), logits.scalar_type(), int64_t(logits.element_size()));
  }
  static void set_groups(const char*, Arguments& arguments, const std::vector<int64_t>& sizes) {
    arguments.group_sizes = sizes.data();
    arguments.n_groups = int64_t(sizes.size());
  }
  static void run(const char* op, const Tensor& logits, Arguments arguments, SoftmaxRowsKernel Kernels::* kernel) {
    arguments.element_type = element_type(op, logits);
    // a gradient that will not be in the caches when it is wanted is written past them, which saves reading it first
    constexpr int64_t cached_bytes = int64_t(8) << 20;
    const int64_t bytes = arguments.n_rows * arguments.n_columns * int64_t(logits.element_size());
    arguments.stream = arguments.grad_logits && arguments.grad_logits != arguments.logits && bytes > cached_bytes;
    for_rows(kernels().*kernel, arguments);
  }
};

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) { ava::RowOperators<ava::CpuRows>::register_all(m); }
