// The row family on the CPU: memory and threads. The operators are in ../softmax_rows_operators.h, the arithmetic is in
// softmax_rows_kernels.h.
#include "../softmax_rows_operators.h"

#include <algorithm>
#include <atomic>

#include "capability.h"
#include "gradient_pool.h"
#include "softmax_rows_arguments.h"
#include "tensors.h"
#include "threads.h"

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

// Threads take a few rows at a time: rows that do not count cost little, and may all be in one place.
void for_rows(SoftmaxRowsKernel kernel, const SoftmaxRowsArguments& arguments) {
  const int64_t rows_at_once = std::max<int64_t>(1, (int64_t(1) << 18) / arguments.n_columns);
  const int64_t n_pieces = (arguments.n_rows + rows_at_once - 1) / rows_at_once;
  const int64_t n_threads = std::min<int64_t>(n_pieces, torch::stable::get_num_threads());
  std::atomic<int64_t> next_piece{0};
  in_threads(n_threads, [&] {
    std::vector<char> scratch(sparse_scratch_bytes(arguments.n_ids));
    for (int64_t piece; (piece = next_piece.fetch_add(1)) < n_pieces;)
      kernel(arguments, piece * rows_at_once, std::min(arguments.n_rows, (piece + 1) * rows_at_once), scratch.data());
  });
}

struct CpuRows {
  using Arguments = SoftmaxRowsArguments;
  using Kernels = SoftmaxRowsKernels;

  static void check_size(const char*, int64_t, int64_t) {}
  static void check_n_ids(const char*, int64_t) {}
  static void check_targets(const RowCall<CpuRows>& call) {
    const Arguments& arguments = call.arguments;
    for (int64_t row = 0; row < arguments.n_rows; ++row) {
      const int64_t target = arguments.targets[row];
      if ((target < 0 || target >= arguments.vocab_size) && target != arguments.ignore_index)
        fail_index(call.op, ": expected targets in [0, ", arguments.vocab_size, ") or ", arguments.ignore_index,
                   ", got ", target, " at position ", row);
    }
  }
  static void set_ids(RowCall<CpuRows>& call, const char* name, const Tensor& ids) {  // [..., n_ids], dense
    if (ids.scalar_type() == ScalarType::Int) {
      call.arguments.ids = static_cast<const int32_t*>(ids.const_data_ptr());
      return for_ids(call, name, call.arguments.ids, [](int64_t, int32_t) {});
    }
    call.kept.push_back(empty_tensor(shape_of(ids), ScalarType::Int));
    auto* const narrow = static_cast<int32_t*>(call.kept.back().mutable_data_ptr());
    call.arguments.ids = narrow;
    for_ids(call, name, static_cast<const int64_t*>(ids.const_data_ptr()),
            [&](int64_t position, int32_t id) { narrow[position] = id; });
  }
  // use(position, id) for every id; -1 for those of rows that do not count, which may be anything
  template <class Id, class Use>
  static void for_ids(const RowCall<CpuRows>& call, const char* name, const Id* ids, Use use) {
    const Arguments& arguments = call.arguments;
    const bool may_be_absent = !(arguments.flags & kIdsArePresent);
    for (int64_t row = 0, position = 0; row < arguments.n_rows; ++row) {
      const bool counts = row_counts(arguments, row, call.real);
      for (const int64_t end = position + arguments.n_ids; position < end; ++position) {
        const int64_t id = counts ? int64_t(ids[position]) : -1;
        const bool is_none = id == -1 ? may_be_absent : id == kTailId && arguments.flags & kTail;
        if ((id < 0 || id >= arguments.vocab_size) && counts && !is_none)
          fail_index(call.op, ": expected ", name, " in [0, ", arguments.vocab_size, ")", may_be_absent ? " or -1" : "",
                     ", got ", id, " at position ", position, " (row ", row, ")");
        use(position, int32_t(id));
      }
    }
  }
  static bool row_counts(const Arguments& arguments, int64_t row, ScalarType real) {
    if (arguments.targets) return arguments.targets[row] != arguments.ignore_index;
    if (arguments.row_mask) return arguments.row_mask[row];
    const auto counts = [&](auto statistics) { return statistics[row].count != 0; };
    if (!arguments.statistics) return true;
    return real == ScalarType::Double ? counts(static_cast<const RowStatistics<double>*>(arguments.statistics))
                                      : counts(static_cast<const RowStatistics<float>*>(arguments.statistics));
  }
  static Tensor new_tensor(const Tensor&, const std::vector<int64_t>& sizes, ScalarType type) {
    return empty_tensor(sizes, type);
  }
  static Tensor new_gradient(const Tensor& logits) { return pooled_empty(gradient_layout(logits), logits); }
  static void set_groups(const char*, Arguments& arguments, const std::vector<int64_t>& sizes) {
    arguments.group_sizes = sizes.data();
    arguments.n_groups = int64_t(sizes.size());
  }
  static void run(const char* op, const Tensor& logits, Arguments arguments, SoftmaxRowsKernel Kernels::* kernel) {
    arguments.element_type = element_type(op, logits);
    // a gradient that will not be in the caches when it is wanted is written past them, which saves reading it first;
    // but each row then waits for what it has written, because of the columns with a coefficient of their own
    constexpr int64_t cached_bytes = int64_t(8) << 20, long_row_bytes = 8192;
    const int64_t row_bytes = arguments.n_columns * int64_t(logits.element_size());
    arguments.stream = arguments.grad_logits && arguments.grad_logits != arguments.logits &&
                       row_bytes >= long_row_bytes && arguments.n_rows * row_bytes > cached_bytes;
    for_rows(kernels().*kernel, arguments);
  }
};

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) { ava::RowOperators<ava::CpuRows>::register_all(m); }
